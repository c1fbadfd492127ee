"""Methods on maps without detectors, and on one batch."""

from types import SimpleNamespace

import pytest
import torch

from stages.detection.records import Features, Targets
from stages.distillation.method import DistillationBatch
from stages.training.clock import Clock


@pytest.fixture
def on_maps():
    """A function from a method's class, its settings and both sides' necks (lists of BCHW) to (method, batch): all that
    a method needs which reads nothing else. The maps lie on a canvas of `size`."""

    def make(kind, settings, mine, theirs, boxes=None, size=(64, 64)):
        shapes = [
            SimpleNamespace(strides=tuple(2**k for k in range(len(maps))), channels=[m.shape[1] for m in maps])
            for maps in (mine, theirs)
        ]
        method = kind(kind.Config(**settings), *shapes).to(mine[0].dtype)
        boxes = boxes or [torch.zeros(0, 4)] * len(mine[0])
        targets = Targets(boxes, [torch.zeros(len(b), dtype=torch.int64) for b in boxes], [size] * len(boxes))
        features = [Features((), tuple(maps), size) for maps in (mine, theirs)]
        return method, SimpleNamespace(features=features[0], teacher_features=features[1], targets=targets)

    return make


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
