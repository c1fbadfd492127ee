"""Linear layers that bring a student's vectors to a teacher's width. They belong to a method and are dropped with it."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PerAnchorLinear(nn.Module):
    """A linear layer for each anchor of a cell, in one matrix (todd/adapts/decouple.py): anchor `a` of `anchors` uses
    rows `a * outside` to `(a + 1) * outside`. With one anchor it is a plain shared layer."""

    def __init__(self, inside: int, outside: int, anchors: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inside, outside * anchors)
        self.anchors = anchors

    def forward(self, x_MC: Tensor, anchor_M: Tensor) -> Tensor:
        """(M, inside) and the anchor of each row to (M, outside)."""
        split: Tensor = self.linear(x_MC).view(len(x_MC), self.anchors, -1)
        return split[torch.arange(len(x_MC), device=x_MC.device), anchor_M % self.anchors]
