"""Precision: what is computed in at least float32 under mixed precision."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_single(tensor: Tensor) -> Tensor:
    """Half precision to float32, all else as it is: losses and probabilities are computed so."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
