"""Operations of a forward pass, counted by torch: multiply-adds times two, of convolutions and matrix products."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from stages.detection.detector import Detector


def inference_flops(detector: Detector, height: int, width: int) -> int:
    """One image of the canvas, features to heads (decoding is not counted by torch)."""
    device = next(detector.parameters()).device
    images = torch.zeros((1, 3, height, width), dtype=torch.uint8, device=device)
    detector.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        detector.predict(detector.features(images))
    return int(counter.get_total_flops())
