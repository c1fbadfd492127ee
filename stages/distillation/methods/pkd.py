"""PKD, distillation by Pearson correlation of neck features (arXiv 2207.02039; mmrazor/models/losses/pkd_loss.py).

Per channel, statistics over batch and space; the loss is half the mean squared difference of the standardised maps,
(M - 1) / M * mean_c (1 - r_c) for M = B * H * W. Neither scale nor shift of a channel matters, so any teacher with a
pyramid fits: two-stage teachers are published with weight 6, one-stage teachers with 10.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, distributed

from pipeline.errors import UserError
from stages.detection.detector import Detector
from stages.distillation.method import DistillationMethod, FeatureBatch, MethodConfig
from stages.distillation.pairing import Pairing, adapters, pair_levels, resized


class _SumOverProcesses(torch.autograd.Function):
    """The sum over all processes. Each process's loss reads it, so its gradient is their sum, too. (torch's own
    differentiable all-reduce is deprecated in favour of a private one.)"""

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        total = local.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total: Tensor = _SumOverProcesses.apply(gradients[0])
        return total


def summed(local: Tensor) -> Tensor:
    """The sum of `local` over all processes of the default group, differentiable."""
    total: Tensor = _SumOverProcesses.apply(local)
    return total


def processes() -> int:
    """How many processes train together: 1 where no process group is initialised."""
    there = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if there else 1


def standardised(map_BCHW: Tensor, eps: float = 1e-6, floor: float = 0.0, over_processes: bool = False) -> Tensor:
    """(C, B * H * W) with mean 0 and unbiased standard deviation 1; `eps` is added to the deviation, as published.

    A channel that deviates by less than `floor` is divided by `floor`: its gradient is then bounded by that of a channel
    at the floor, where 1 / eps = 1e6 would blow it up. 0 is as published. One value a channel (B * H * W = 1) gives 0, for
    it deviates from nothing; the original gives NaN. `over_processes` takes mean and deviation over the batches of all
    processes of the default group, of whatever size each is; gradients flow through both.
    """
    precise = map_BCHW if map_BCHW.dtype == torch.float64 else map_BCHW.float()  # eps is subnormal in half precision
    rows = precise.transpose(0, 1).flatten(1)
    if over_processes:
        count = summed(rows.new_tensor(rows.shape[1]))
        centred = rows - summed(rows.sum(1, keepdim=True)) / count
        squares = summed(centred.square().sum(1, keepdim=True))
        deviation = (squares.clamp(min=1e-30) / (count - 1).clamp(min=1)).sqrt()  # the root of 0 has no gradient
    else:
        centred = rows - rows.mean(1, keepdim=True)
        # torch.std, by a norm of what is centred anyway: it took a third of the method's time, and its gradient at 0 is 0
        # too.
        norm = torch.linalg.vector_norm(centred, dim=1, keepdim=True)
        deviation = norm / math.sqrt(max(rows.shape[1] - 1, 1))
    if floor:
        deviation = deviation.clamp(min=floor)
    standard: Tensor = centred * (1 / (deviation + eps))
    return standard


def pkd_loss(
    student_BCHW: Tensor,
    teacher_BCHW: Tensor,
    resize: Literal["student", "teacher"] = "student",
    floor: float = 0.0,
    over_processes: bool = False,
) -> Tensor:
    """The loss of one pair of maps with equal channels; where rows or columns differ, one is resized (bilinear) before the
    statistics. `floor` and `over_processes` as in `standardised`.

    B * H * W = 1 gives 0, as (M - 1) / M says. Over processes, the mean of what they return is the loss of the whole batch,
    and so is, after DDP's averaging, its gradient.
    """
    teacher_BCHW = teacher_BCHW.detach()
    if resize == "student":
        student_BCHW = resized(student_BCHW, teacher_BCHW.shape[-2:])
    else:
        teacher_BCHW = resized(teacher_BCHW, student_BCHW.shape[-2:])
    mine = standardised(student_BCHW, floor=floor, over_processes=over_processes)
    squared = (mine - standardised(teacher_BCHW, floor=floor, over_processes=over_processes)).square()
    if over_processes:
        return 0.5 * squared.sum() * processes() / summed(squared.new_tensor(squared.numel()))
    return 0.5 * squared.mean()


class PKD(DistillationMethod):
    """The student's finest levels against the teacher's, paired by index: P3 with P2 where the student begins one later."""

    learns_unlabelled = True

    class Config(MethodConfig):
        weight: float = Field(default=6.0, ge=0)
        """Weight of each level's loss: 6 for two-stage teachers, 10 for one-stage ones."""
        levels: int = Field(default=4, ge=1)
        """How many pairs of levels learn, from the finest."""
        pairing: Pairing = "index"
        """By index, as published: the finest with the finest, and so on; or levels of equal stride."""
        resize: Literal["student", "teacher"] = "student"
        """Whose map is resized where the sizes differ."""
        floor: float = Field(default=1e-3, ge=0)
        """Ours: channels that deviate by less are divided by this. It bounds the gradient of dead channels, and changes no
        other; 0 is as published."""
        statistics: Literal["process", "global"] = "process"
        """Mean and deviation of each process's batch, as published, or (ours) of the batches of all processes together."""

    def __init__(self, config: PKD.Config, student: Detector, teacher: Detector | None) -> None:
        super().__init__(config, student, teacher)
        assert teacher is not None
        self.config = config
        try:
            self.pairs = pair_levels(student.strides, teacher.strides, config.pairing)[: config.levels]
        except ValueError as problem:
            raise UserError(f"method pkd: {problem}") from problem
        # Ours: the published pairs all have 256 channels; a 1x1 convolution bridges others, and goes with the method.
        self.adapters = adapters(self.pairs, student.channels, teacher.channels)

    def forward(self, batch: FeatureBatch) -> Mapping[str, Tensor]:
        config, mine, theirs = self.config, batch.features.levels, batch.teacher_features.levels
        together = config.statistics == "global" and processes() > 1
        losses = [
            pkd_loss(adapter(mine[s]), theirs[t], config.resize, config.floor, together)
            for adapter, (s, t) in zip(self.adapters, self.pairs, strict=True)
        ]
        return {"feature": config.weight * sum(losses[1:], losses[0])}
