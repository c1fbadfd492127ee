"""HGD-style hands-on guidance: all stages of backbone and neck, re-weighted inside a map and across maps. Ours.

Of the publication (arXiv 2103.14337) only the abstract was at hand. It names four parts: all stage features,
correspondence between them, a hands-on imitation loss, re-weighted optimisation at micro and macro level. Every equation,
weight and setting below is our reading of it, and no published number is claimed for it.

    student's C2-C5, P3-P7 --1x1 convolution, bilinear where sizes differ--> a
    teacher's map of the nearest stride ---------------------------------> t
    e_p = (1 - cos(a, t)) + magnitude * ((|a| - |t|) / mean |t|)^2     at each position p, vectors over channels
    L_k = mean_p w_p e_p                                               w: micro weights, mean 1 over a map
    L   = weight * 1/K * sum_k W_k L_k                                 W: macro weights, mean 1 over the K maps

All pairs of detectors fit: heads are not read.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from pipeline.errors import UserError
from stages.detection.detector import Detector
from stages.distillation.method import DistillationBatch, DistillationMethod, MethodConfig
from stages.distillation.pairing import adapters, backbone_shape, resized
from stages.training.clock import warmed


def nearest_pairs(student_strides: Sequence[int], teacher_strides: Sequence[int]) -> list[tuple[int, int]]:
    """(student's, teacher's) index for every map of the student: the teacher's of the nearest stride, by ratio; of two
    that are as near, the finer."""
    pairs = []
    for index, stride in enumerate(student_strides):
        distance = [(abs(math.log2(stride / theirs)), theirs) for theirs in teacher_strides]
        pairs.append((index, distance.index(min(distance))))
    return pairs


def stages_that_learn(detector: Detector) -> tuple[bool, ...]:
    """Per stage of the backbone, whether anything below it is trained; from shapes alone, the detector stays as it is."""
    shadow = copy.deepcopy(detector).eval().to("meta")
    with torch.enable_grad():
        stages = shadow.features(torch.empty(1, 3, 128, 128, device="meta")).backbone
    return tuple(stage.requires_grad for stage in stages)


def imitation_error(
    adapted_BCHW: Tensor, teacher_BCHW: Tensor, magnitude: float, floor: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(e_BHW, direction_BHW): the error at each position, and its part that is 1 - cos of the two vectors.

    1 - cos is written as half the squared distance of the unit vectors, which it equals: so it is never negative, and
    exactly 0 for equal vectors. A vector shorter than `floor` times the teacher's mean length in the image (plus 1e-6) is
    divided by that length instead of its own, which bounds the gradient and keeps zero vectors finite.
    """
    teacher_BCHW = teacher_BCHW.detach()
    mine_BHW = torch.linalg.vector_norm(adapted_BCHW, dim=1)
    theirs_BHW = torch.linalg.vector_norm(teacher_BCHW, dim=1)
    mean_B11 = theirs_BHW.mean((1, 2), keepdim=True)
    least = floor * mean_B11 + 1e-6
    unit = adapted_BCHW / mine_BHW.clamp(min=least)[:, None]
    direction = 0.5 * (unit - teacher_BCHW / theirs_BHW.clamp(min=least)[:, None]).square().sum(1)
    length = ((mine_BHW - theirs_BHW) / (mean_B11 + 1e-6)).square()
    return direction + magnitude * length, direction


@torch.no_grad()
def micro_weights(teacher_BCHW: Tensor, direction_BHW: Tensor, temperature: float, hardness: float) -> Tensor:
    """BHW, not negative, mean 1 over each image: a softmax over positions of the teacher's mean activation plus `hardness`
    times how far the directions are apart, each relative to its mean over the image."""
    active = teacher_BCHW.abs().mean(1)
    least = torch.finfo(active.dtype).tiny
    score = active / active.mean((1, 2), keepdim=True).clamp(min=least)
    score = score + hardness * direction_BHW / direction_BHW.mean((1, 2), keepdim=True).clamp(min=least)
    flat = score.flatten(1)
    return ((flat / temperature).softmax(1) * flat.shape[1]).view_as(score)


@torch.no_grad()
def macro_weights(average_K: Tensor, temperature: float) -> Tensor:
    """(K,), not negative, mean 1: a softmax of each map's running loss relative to the mean over maps. What lags counts
    more. A common factor cancels, so an average that began at 0 needs no correction."""
    relative = average_K / average_K.mean().clamp(min=torch.finfo(average_K.dtype).tiny)
    return (relative / temperature).softmax(0) * len(average_K)


class HandsOn(DistillationMethod):
    """Imitation of all stages with the difficult positions and maps in front; `weighting: equal` is plain imitation."""

    average_K: Tensor

    class Config(MethodConfig):
        weight: float = Field(default=1.0, ge=0)
        """Ours: weight of the mean over maps."""
        warmup: int = Field(default=500, ge=0)
        """Ours: iterations over which the weight rises from 0."""
        weighting: Literal["both", "micro", "macro", "equal"] = "both"
        """Ours: positions inside a map (micro) and maps (macro) are re-weighted, one of them, or neither."""
        magnitude: float = Field(default=0.5, ge=0)
        """Ours: weight of the difference in length beside that in direction."""
        micro_temperature: float = Field(default=0.5, gt=0)
        """Ours: the larger, the more equal the positions."""
        hardness: float = Field(default=1.0, ge=0)
        """Ours: how much a position's present error counts beside the teacher's activation there."""
        macro_temperature: float = Field(default=1.0, gt=0)
        """Ours: the larger, the more equal the maps."""
        momentum: float = Field(default=0.99, ge=0, lt=1)
        """Ours: of the running mean of each map's loss, by which the maps are re-weighted."""
        floor: float = Field(default=0.01, ge=0)
        """Ours: vectors shorter than this share of the teacher's mean length are not stretched to unit length, which bounds
        their gradient."""
        adapters: Literal["separate", "needed"] = "separate"
        """Ours: a 1x1 convolution on every map of the student, for two networks that learnt apart share neither basis nor
        scale; or only where channels differ."""
        finest_stride: int = Field(default=4, ge=1)
        """Ours: the student's maps of a finer stride are left out; 8 leaves out C2, the largest."""

    def __init__(self, config: HandsOn.Config, student: Detector, teacher: Detector | None) -> None:
        super().__init__(config, student, teacher)
        assert teacher is not None
        self.config = config
        strides, channels = backbone_shape(student)
        their_strides, their_channels = backbone_shape(teacher)
        # A frozen stage cannot imitate, and the more it lags the more weight it would draw from those that can.
        learns = stages_that_learn(student)
        backbone = [(s, t) for s, t in nearest_pairs(strides, their_strides) if learns[s]]
        self.backbone = [(s, t) for s, t in backbone if strides[s] >= config.finest_stride]
        neck = nearest_pairs(student.strides, teacher.strides)
        self.neck = [(s, t) for s, t in neck if student.strides[s] >= config.finest_stride]
        if not self.backbone and not self.neck:
            raise UserError(
                f"method hands_on: no map is left, the student's trained stages have strides "
                f"{[stride for stride, learning in zip(strides, learns, strict=True) if learning]}, its neck "
                f"{list(student.strides)}, finest_stride is {config.finest_stride}; lower finest_stride"
            )
        always = config.adapters == "separate"
        self.adapters = adapters(self.backbone, channels, their_channels, always)
        self.adapters.extend(adapters(self.neck, student.channels, teacher.channels, always))
        # A buffer: the weights of the next step depend on it, so a run that goes on must find it again.
        self.register_buffer("average_K", torch.zeros(len(self.adapters)))

    def pairs(self, batch: DistillationBatch) -> list[tuple[Tensor, Tensor]]:
        """(student's map adapted and resized, the teacher's map): the backbone's, then the neck's."""
        mine, theirs = batch.features, batch.teacher_features
        maps = [(mine.backbone[s], theirs.backbone[t]) for s, t in self.backbone]
        maps += [(mine.levels[s], theirs.levels[t]) for s, t in self.neck]
        return [(resized(f(m), t.shape[-2:]), t) for f, (m, t) in zip(self.adapters, maps, strict=True)]

    def forward(self, batch: DistillationBatch) -> Mapping[str, Tensor]:
        """`backbone` and `neck`: each kind's part of the mean over all maps."""
        config, found = self.config, []
        for mine, theirs in self.pairs(batch):
            error, direction = imitation_error(mine, theirs, config.magnitude, config.floor)
            if config.weighting in ("both", "micro"):
                error = error * micro_weights(theirs, direction, config.micro_temperature, config.hardness)
            found.append(error.mean())
        losses_K = torch.stack(found)
        if self.training:
            self.average_K.lerp_(losses_K.detach().to(self.average_K.dtype), 1 - config.momentum)
        weights_K = torch.ones_like(losses_K)
        if config.weighting in ("both", "macro"):
            weights_K = macro_weights(self.average_K, config.macro_temperature)
        weighted_K = warmed(config.weight, batch.clock, config.warmup) / len(found) * weights_K * losses_K
        count = len(self.backbone)
        terms = {"backbone": weighted_K[:count], "neck": weighted_K[count:]}
        return {name: term.sum() for name, term in terms.items() if len(term)}
