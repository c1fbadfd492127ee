"""PKD, distillation by Pearson correlation of neck features (arXiv 2207.02039; mmrazor/models/losses/pkd_loss.py).

Per channel, statistics over batch and space; the loss is half the mean squared difference of the standardised maps,
(M - 1) / M * mean_c (1 - r_c) for M = B * H * W. Neither scale nor shift of a channel matters, so any teacher with a
pyramid fits: two-stage teachers are published with weight 6, one-stage teachers with 10.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from stages.detection.detector import Detector
from stages.distillation.method import DistillationBatch, DistillationMethod, MethodConfig


def standardised(map_BCHW: Tensor, eps: float = 1e-6) -> Tensor:
    """(C, B * H * W) with mean 0 and unbiased standard deviation 1; `eps` is added to the deviation, as published."""
    precise = map_BCHW if map_BCHW.dtype == torch.float64 else map_BCHW.float()  # eps is subnormal in half precision
    rows = precise.transpose(0, 1).flatten(1)
    centred = rows - rows.mean(1, keepdim=True)
    # torch.std, by a norm of what is centred anyway: it took a third of the method's time, and its gradient at 0 is 0 too.
    # One value a channel gives 0 / 0: NaN, as in the original.
    deviation = torch.linalg.vector_norm(centred, dim=1, keepdim=True) / math.sqrt(rows.shape[1] - 1)
    standard: Tensor = centred * (1 / (deviation + eps))
    return standard


def pkd_loss(student_BCHW: Tensor, teacher_BCHW: Tensor, resize: Literal["student", "teacher"] = "student") -> Tensor:
    """The loss of one pair of maps with equal channels; sizes are made equal by bilinear resizing before the statistics.

    Needs at least two values a channel (B * H * W > 1): the unbiased deviation of one value is undefined.
    """
    teacher_BCHW = teacher_BCHW.detach()
    if student_BCHW.shape[-2:] != teacher_BCHW.shape[-2:]:
        if resize == "student":
            student_BCHW = functional.interpolate(student_BCHW, teacher_BCHW.shape[-2:], mode="bilinear")
        else:
            teacher_BCHW = functional.interpolate(teacher_BCHW, student_BCHW.shape[-2:], mode="bilinear")
    return 0.5 * (standardised(student_BCHW) - standardised(teacher_BCHW)).square().mean()


class PKD(DistillationMethod):
    """The student's finest levels against the teacher's, paired by index: P3 with P2 where the student begins one later."""

    class Config(MethodConfig):
        weight: float = Field(default=6.0, ge=0)
        """Weight of each level's loss: 6 for two-stage teachers, 10 for one-stage ones."""
        levels: int = Field(default=4, ge=1)
        """How many levels are paired, from the finest."""
        resize: Literal["student", "teacher"] = "student"
        """Whose map is resized where the sizes differ."""

    def __init__(self, config: PKD.Config, student: Detector, teacher: Detector | None) -> None:
        super().__init__(config, student, teacher)
        assert teacher is not None
        self.config = config
        pairs = list(zip(student.channels, teacher.channels, strict=False))[: config.levels]
        # Ours: the published pairs all have 256 channels; a 1x1 convolution bridges others, and goes with the method.
        self.adapters = nn.ModuleList(nn.Identity() if s == t else nn.Conv2d(s, t, 1) for s, t in pairs)

    def forward(self, batch: DistillationBatch) -> Mapping[str, Tensor]:
        pairs = zip(self.adapters, batch.features.levels, batch.teacher_features.levels, strict=False)
        losses = [pkd_loss(adapter(student), teacher, self.config.resize) for adapter, student, teacher in pairs]
        return {"feature": self.config.weight * sum(losses[1:], losses[0])}
