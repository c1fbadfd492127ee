"""Operations of a forward pass, counted by torch: multiply-adds times two, of convolutions and matrix products."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from stages.detection.detector import Detector, Targets
from stages.distillation.task import DistillationTask
from stages.training.clock import Clock


def inference_flops(detector: Detector, height: int, width: int) -> int:
    """One image of the canvas, features to heads (decoding is not counted by torch)."""
    device = next(detector.parameters()).device
    images = torch.zeros((1, 3, height, width), dtype=torch.uint8, device=device)
    detector.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        detector.predict(detector.features(images))
    return int(counter.get_total_flops())


def methods_flops(task: DistillationTask, height: int, width: int) -> int:
    """What the methods (and the teacher they ask) add to one training forward on one image of the canvas, with one
    object in its middle."""
    device = next(task.student.parameters()).device
    images = torch.zeros((1, 3, height, width), dtype=torch.uint8, device=device)
    box = torch.tensor([[width / 4, height / 4, width * 3 / 4, height * 3 / 4]], device=device)
    targets = Targets([box], [torch.zeros(1, dtype=torch.int64, device=device)], [(height, width)])
    task.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        task(images, targets, Clock(1, 2, 1))
    return int(counter.get_total_flops()) - inference_flops(task.student, height, width)
