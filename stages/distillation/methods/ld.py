"""LD, localisation distillation (arXiv 2102.12252; HikariTJU/LD mmdet/models/dense_heads/ld_head.py, losses/kd_loss.py).

A side of a box is a distribution over distances; the student's is drawn to the teacher's, where a box is (main region)
and where it may be of use (valuable region):

    e_i = mean over the 4 sides of  tau^2 / N * KL(softmax(T_i / tau) || softmax(S_i / tau))        N bins
    L   = main * sum over positives of p_i e_i  +  valuable / 4 * sum over the region of v_i e_i
        + cls / positives * sum over positives of  tau_c^2 / K * KL over the K classes

p_i is the student's highest class probability, detached. The region are the points with alpha * t <= DIoU < t for an
object whose positives begin at an overlap of t, v_i their overlap with it. Fits two detectors whose sides are distributions
over the same distances: two of `gfl` with equal `bins`. Levels of equal stride are compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional
from torchvision.ops import distance_box_iou

from pipeline.errors import UserError
from stages.detection.assignment import Assignment, squares
from stages.detection.detector import Detector
from stages.detection.detectors.gfl import GFL
from stages.detection.records import DensePredictions
from stages.distillation.method import DistillationBatch, DistillationMethod, MethodConfig, kinds
from stages.distillation.pairing import pair_levels


def distribution_error(student: Tensor, teacher: Tensor, tau: float) -> Tensor:
    """tau^2 times the mean over the last axis of the terms of KL(softmax(teacher / tau) || softmax(student / tau))."""
    mine, theirs = ((logits / tau).log_softmax(-1) for logits in (student, teacher.detach()))
    return tau**2 * functional.kl_div(mine, theirs, reduction="none", log_target=True).mean(-1)


@torch.no_grad()
def valuable(assignment: Assignment, boxes_A4: Tensor, truth_N4: Tensor, alpha: float) -> Tensor:
    """(A,) The highest overlap with an object in whose valuable region the anchor lies; 0 outside of all.

    By the paper's DIoU (arXiv 1911.08287). The released code divides the overlap by the anchor's own area instead.
    """
    if not len(truth_N4):
        return boxes_A4.new_zeros(len(boxes_A4))
    diou_AN = distance_box_iou(boxes_A4, truth_N4)
    inside = (diou_AN < assignment.threshold_N) & (diou_AN >= alpha * assignment.threshold_N)
    return torch.where(inside, assignment.iou_AN, 0.0).amax(1)


class Said(NamedTuple):
    """What one detector says of the points that both have."""

    sides_BA4N: Tensor
    logits_BAK: Tensor


class LD(DistillationMethod):
    """The student's sides and classes against the teacher's, at the student's own positives and around them."""

    class Config(MethodConfig):
        main: float = Field(default=0.25, ge=0)
        """Weight of the sides of positives."""
        valuable: float = Field(default=0.25, ge=0)
        """Weight of the sides in the valuable region."""
        cls: float = Field(default=10.0, ge=0)
        """Weight of the classes of positives."""
        tau: float = Field(default=10.0, gt=0)
        """Temperature of the sides."""
        cls_tau: float = Field(default=2.0, gt=0)
        """Temperature of the classes."""
        alpha: float = Field(default=0.25, ge=0, le=1)
        """Where the valuable region begins, as a share of the overlap at which an object's positives do."""
        normalise: bool = False
        """Ours: divide both sums over sides by the sum of their weights (at least 1), as the student's own loss of boxes is;
        published sums grow with the batch and its objects."""

    def __init__(self, config: LD.Config, student: Detector, teacher: Detector | None) -> None:
        super().__init__(config, student, teacher)
        if not isinstance(student, GFL) or not isinstance(teacher, GFL):
            raise UserError(
                "method ld: it compares sides that are distributions, which two gfl have, was given "
                f"{kinds(student, teacher)}; take a gfl for both, or pkd"
            )
        if student.bins != teacher.bins:
            raise UserError(
                f"method ld: distributions over the same distances are compared, the student has bins: {student.bins}, the "
                f"teacher {teacher.bins}; give both the same bins"
            )
        self.config = config
        try:
            self.pairs = pair_levels(student.strides, teacher.strides)
        except ValueError as problem:
            raise UserError(f"method ld: {problem}") from problem

    def forward(self, batch: DistillationBatch) -> Mapping[str, Tensor]:
        mine, theirs = batch.predictions, batch.teacher_predictions
        assert isinstance(batch.student, GFL)
        assert isinstance(mine, DensePredictions)
        assert isinstance(theirs, DensePredictions)
        around = squares(mine.anchors, batch.student.config.anchor_scale)
        positive, region = [], []
        for truth in batch.targets.boxes:
            assignment = batch.student.assign(truth, mine.anchors)
            positive.append(assignment.match_A >= 0)
            region.append(valuable(assignment, around, truth, self.config.alpha))
        own, guide = (self._rows(said, side) for side, said in enumerate((mine, theirs)))
        kept = self._kept(mine, 0)
        return self.terms(own, guide, torch.stack(positive)[:, kept], torch.stack(region)[:, kept])

    def terms(self, own: Said, guide: Said, positive_BA: Tensor, valuable_BA: Tensor) -> dict[str, Tensor]:
        """The losses, from what both say, the student's positives and the overlaps in the valuable region."""
        config = self.config
        sides = own.sides_BA4N[positive_BA], guide.sides_BA4N[positive_BA]
        logits = own.logits_BAK[positive_BA], guide.logits_BAK[positive_BA]
        sure_P = logits[0].detach().sigmoid().amax(-1)
        inside_BA = valuable_BA > 0
        value_V = valuable_BA[inside_BA]
        around = own.sides_BA4N[inside_BA], guide.sides_BA4N[inside_BA]
        main = (distribution_error(*sides, config.tau).mean(-1) * sure_P).sum()
        further = (distribution_error(*around, config.tau).mean(-1) * value_V).sum() / 4
        if config.normalise:
            main, further = main / sure_P.sum().clamp(min=1), further / value_V.sum().clamp(min=1)
        classes = distribution_error(*logits, config.cls_tau).sum() / max(1, len(sure_P))
        return {"main": config.main * main, "valuable": config.valuable * further, "cls": config.cls * classes}

    def _rows(self, said: DensePredictions, side: int) -> Said:
        kept = self._kept(said, side)
        assert said.sides_BA4N is not None
        return Said(said.sides_BA4N[:, kept], said.logits_BAK[:, kept])

    def _kept(self, said: DensePredictions, side: int) -> Tensor:
        """Indices of the points of the levels that both have; `side` is 0 for the student, 1 for the teacher."""
        counts = said.anchors.per_level
        begins = list(accumulate(counts, initial=0))
        levels = [pair[side] for pair in self.pairs]
        device = said.logits_BAK.device
        return torch.cat([torch.arange(begins[n], begins[n] + counts[n], device=device) for n in levels])
