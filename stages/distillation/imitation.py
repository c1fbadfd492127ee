"""What HEAD and its kin compare: hidden layers of two heads, and the student's tower where the RoIs came from."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

Layer = tuple[Tensor, ...]
"""One hidden layer after its ReLU: the rows (M, D) of all RoIs as the only part, or a map BCHW for each level."""


def imitation(adapted: Tensor, target: Tensor, normalise: bool = False) -> Tensor:
    """Mean squared error over all elements to the detached target; divided by the target's mean square if `normalise`.

    Without rows it is 0 with a zero gradient, where the original returns NaN.
    """
    target = target.detach()
    if not len(target):
        return adapted.sum() * 0.0
    loss = functional.mse_loss(adapted, target)
    return loss / target.square().mean().clamp(min=1e-6) if normalise else loss


def layer_imitation(adapted: Layer, target: Layer, normalise: bool = False) -> Tensor:
    """`imitation` of each part, summed: over levels, where the layer has them."""
    parts = [imitation(mine, theirs, normalise) for mine, theirs in zip(adapted, target, strict=True)]
    return torch.stack(parts).sum()


def gather_cells(tower: Layer, image_M: Tensor, source_M: Tensor, per_cell: int) -> Tensor:
    """Rows (M, C) of the tower maps at the cells that the flat anchor indices `source_M` lie in."""
    cells_BCN = torch.cat([level.flatten(2) for level in tower], 2)
    return cells_BCN[image_M, :, torch.div(source_M, per_cell, rounding_mode="floor")]
