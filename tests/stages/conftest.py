"""A small real dataset, a tiny detector of each kind that any test may train for a few steps, and numbers computed by
the methods' own authors' code, where they are at hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config import Choice
from stages import dataset as dataset_stage
from stages.detection.detector import Detector

REFERENCE = Path(__file__).resolve().parents[3] / "shared" / "data" / "reference"
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


@pytest.fixture
def reference():
    """A function from a file's name to its arrays as tensors; skips where the vectors are not at hand."""

    def load(name):
        file = REFERENCE / f"{name}.npz"
        if not file.exists():
            pytest.skip(
                "the reference vectors (../shared/data/reference) are not here; golden numbers are tested instead"
            )
        with np.load(file) as arrays:
            found = {key: arrays[key] for key in arrays.files}
        settings = json.loads(str(found.pop("settings_json")))
        found.pop("source", None)
        numbers = {k: torch.from_numpy(np.asarray(v)) for k, v in found.items() if v.dtype.kind in "fiub"}
        return numbers, settings

    return load


@pytest.fixture
def assert_near():
    """A function that compares by the largest difference over the largest value (`scale` where that is larger: the
    gradient of what does not matter is rounding), in the precision of what was found."""

    def check(found, wanted, tolerance=1e-9, scale=0.0):
        wanted = wanted.to(found.dtype)
        largest = max(wanted.abs().max().item(), scale)
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance * largest)

    return check
