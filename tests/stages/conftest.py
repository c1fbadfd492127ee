"""A small real dataset, and a tiny teacher and student that any test may train for a few steps."""

import pytest
import torch

from pipeline.config import Choice
from stages import dataset as dataset_stage
from stages.detection.detector import Detector

TINY = {
    "backbone": "tiny",
    "backbone_norm": "batch",
    "trainable_layers": 5,
    "neck_channels": 16,
}
STUDENT = {
    "name": "retinanet",
    "extra_levels": 1,
    "head_convs": 1,
    "head_norm": "group",
    "anchor_scale": 2,
    "aspect_ratios": [1.0],
    **TINY,
}
POINTS = {"name": "fcos", "extra_levels": 1, "head_convs": 1, "reach": 2, **TINY}
DISTRIBUTIONS = {
    "name": "gfl",
    "neck": "pan",
    "extra_levels": 1,
    "head_convs": 1,
    "head_kind": "depthwise",
    "head_norm": "batch",
    "head_kernel": 1,
    "anchor_scale": 4,
    "bins": 8,
    **TINY,
}
SSD = {"name": "ssdlite", "width": 0.25}
TEACHER = {
    "name": "faster_rcnn",
    "extra_levels": 0,
    "anchor_scale": 4,
    "aspect_ratios": [1.0],
    "proposals": 32,
    "proposals_training": 32,
    "rois": 16,
    "roi_head": {"hidden": 32, "sampling_ratio": 1},
    **TINY,
}
CASCADE = {**TEACHER, "name": "cascade_rcnn"}


def placed(folder, name, stage, config, **slots):
    """Run a stage in a new folder of `folder` and place what it made."""
    directory = folder / name
    directory.mkdir()
    return stage.run(stage.Config(**config), directory, **slots).placed(directory, name=name, key=f"{name}-key")


@pytest.fixture(scope="session")
def make():
    """The function `placed`."""
    return placed


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """40 training and 12 validation images of plate digits, as the dataset stage makes them."""
    directory = tmp_path_factory.mktemp("digits")
    source = {"name": "digits", "train": 40, "val": 12, "size": 128, "seed": 0}
    made = dataset_stage.run(dataset_stage.Config(source=source, size=128), directory)
    return made.placed(directory, name="data", key="data-key")


@pytest.fixture
def build():
    """A function from settings to a detector for ten classes with weights from seed 0."""

    def make(settings, classes=10):
        torch.manual_seed(0)
        choice = Choice.parse(Detector, settings)
        return choice.cls.build(choice.config, classes)

    return make


@pytest.fixture(scope="session")
def student_settings():
    """A tiny RetinaNet."""
    return STUDENT


@pytest.fixture(scope="session")
def points_settings():
    """A tiny FCOS."""
    return POINTS


@pytest.fixture(scope="session")
def distributions_settings():
    """A tiny GFL."""
    return DISTRIBUTIONS


@pytest.fixture(scope="session")
def ssd_settings():
    """A narrow SSDLite."""
    return SSD


@pytest.fixture(scope="session")
def teacher_settings():
    """A tiny Faster R-CNN."""
    return TEACHER


@pytest.fixture(scope="session")
def cascade_settings():
    """A tiny Cascade R-CNN."""
    return CASCADE
