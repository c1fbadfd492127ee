"""Numbers computed by the methods' own authors' code, where they are at hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from stages.detection.detector import Targets
from stages.distillation.method import DistillationBatch
from stages.training.clock import Clock

REFERENCE = Path(__file__).resolve().parents[4] / "shared" / "data" / "reference"


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
def seen():
    """A function from student and teacher to one batch as the student saw it; its features keep their gradients."""

    def look(student, teacher=None, iteration=5):
        images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        targets = Targets([torch.tensor([[8.0, 8, 40, 40]])] * 2, [torch.tensor([1])] * 2, [(64, 64)] * 2)
        features = student.features(images)
        for level in features.levels:
            level.retain_grad()
        predictions = student.predict(features, targets)
        clock = Clock(iteration, 10**6, 1)
        return DistillationBatch(images, targets, student, features, predictions, clock, teacher)

    return look
