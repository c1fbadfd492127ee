"""Generalised focal loss (arXiv 2006.04388): a class score that is also the quality of its box, and a box whose sides are
distributions.

A side's distance is the mean of a distribution over 0, 1, ... n - 1 strides, so its logits say how sure the box is.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def quality_focal(logits: Tensor, wanted: Tensor, beta: float = 2.0) -> Tensor:
    """Each element's cross entropy to the probability `wanted`, times its distance to it to the power `beta` (eq. 5); the
    gradient passes through the distance too, as in the original."""
    distance = (wanted - logits.sigmoid()).abs()
    return distance.pow(beta) * functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none")


def distribution_focal(sides_P4N: Tensor, wanted_P4: Tensor) -> Tensor:
    """(P, 4): cross entropy to the two bins around each wanted distance, weighted by its nearness to them (eq. 6). Distances
    lie in [0, N - 1]; one beyond is taken for the last bin, less 0.1 as in the original, so that it lies between two."""
    last = sides_P4N.shape[-1] - 1
    wanted = wanted_P4.clamp(0, last - 0.1)
    lower = wanted.floor().long()
    above = wanted - lower
    chances = sides_P4N.log_softmax(-1)
    below_loss = -chances.gather(-1, lower[..., None]).squeeze(-1)
    above_loss = -chances.gather(-1, lower[..., None] + 1).squeeze(-1)
    return (1 - above) * below_loss + above * above_loss


def expected(sides_BA4N: Tensor, bins_N: Tensor) -> Tensor:
    """The mean distance of each side, in anchor sides; `bins_N` are 0, 1, ... N - 1."""
    mean: Tensor = (sides_BA4N.softmax(-1) * bins_N).sum(-1)
    return mean


def bins_of(count: int) -> Tensor:
    """0, 1, ... `count` - 1."""
    return torch.arange(count, dtype=torch.float32)
