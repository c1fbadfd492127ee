"""Overlap of boxes row by row; of every box with every other it is torchvision's `box_iou`."""

from __future__ import annotations

import torch
from torch import Tensor


def paired_iou(first_N4: Tensor, second_N4: Tensor) -> Tensor:
    """(N,) IoU of each row with the same row; 0 where both are empty."""
    corner = torch.maximum(first_N4[:, :2], second_N4[:, :2])
    inside = (torch.minimum(first_N4[:, 2:], second_N4[:, 2:]) - corner).clamp(min=0).prod(1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1) for boxes in (first_N4, second_N4)]
    return inside / (areas[0] + areas[1] - inside).clamp(min=1e-6)
