"""CrossKD, the student's head features sent through the teacher's head (arXiv 2306.11369; equations and behaviour of
jbwang1997/CrossKD mmdet/models/detectors/crosskd_retinanet.py).

    student's tower, after `convs` convolutions --1x1 where channels differ--> statistics of the teacher's --ReLU--.
                          the teacher's predictions <--imitated by-- the rest of the teacher's tower, frozen <-------'

    L = 1 / positives * (cls * sum over anchors and classes of |p - q|^beta BCE(p, q)  +  box * sum of q_max GIoU loss)

p and q are the probabilities of the crossed features and of the teacher, the boxes those that both decode to. Anchors
between background and object are left out. Only the teacher's anchors and classes count, so the student may have others:
it fits any student with a dense head and a RetinaNet teacher whose levels have a stride in common with it; a two-stage
teacher has no head that a student's tower could enter. Nothing reaches the student's last convolutions, its own
predictions learn from the ground truth only.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate, pairwise
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from pipeline.errors import UserError
from stages.detection.dense_head import DenseHead, by_anchor
from stages.detection.detector import DenseDetector, Detector
from stages.detection.detectors.retinanet import RetinaNet
from stages.detection.generalised_focal import quality_focal
from stages.detection.records import DensePredictions, Targets
from stages.distillation.method import DistillationBatch, DistillationMethod, MethodConfig, kinds
from stages.distillation.pairing import adapters, pair_levels, resized


def restandardised(student_BCHW: Tensor, teacher_BCHW: Tensor, eps: float = 1e-6) -> Tensor:
    """The student's map with the teacher's mean and unbiased deviation in each channel, over batch and space.

    A dead channel, and a single value a channel, become the teacher's mean.
    """

    def parts(map_BCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean = map_BCHW.mean((0, 2, 3), keepdim=True)
        centred = map_BCHW - mean
        count = map_BCHW[:, 0].numel()
        # A norm, and not torch.std: its gradient is 0 where nothing varies.
        norm = torch.linalg.vector_norm(centred, dim=(0, 2, 3), keepdim=True)
        return centred, mean, norm / max(count - 1, 1) ** 0.5

    centred, _, deviation = parts(student_BCHW)
    _, wanted_mean, wanted_deviation = parts(teacher_BCHW.detach())
    return centred / (deviation + eps) * wanted_deviation + wanted_mean


def box_error(boxes_N4: Tensor, wanted_N4: Tensor, kind: Literal["giou", "iou"] = "giou", eps: float = 1e-6) -> Tensor:
    """1 - GIoU (arXiv 1902.09630) or -log IoU of each pair of xyxy boxes. torchvision's losses add eps to an area where
    the original takes eps as the least area, which is another number."""
    wanted_N4 = wanted_N4.detach()

    def area(corners: Tensor) -> Tensor:
        return (corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1])

    low, high = torch.maximum(boxes_N4[:, :2], wanted_N4[:, :2]), torch.minimum(boxes_N4[:, 2:], wanted_N4[:, 2:])
    overlap = (high - low).clamp(min=0).prod(1)
    union = (area(boxes_N4) + area(wanted_N4) - overlap).clamp(min=eps)
    iou = overlap / union
    if kind == "iou":
        return -iou.clamp(min=eps).log()
    low, high = torch.minimum(boxes_N4[:, :2], wanted_N4[:, :2]), torch.maximum(boxes_N4[:, 2:], wanted_N4[:, 2:])
    hull = (high - low).clamp(min=0).prod(1).clamp(min=eps)
    return 1 - iou + (hull - union) / hull


def crossed(tail: nn.Module, student_BCHW: Tensor, teacher_BCHW: Tensor, rectify: bool) -> Tensor:
    """What the teacher's `tail` makes of the student's map. `rectify`: the maps are behind a ReLU, so after the change of
    statistics the student's is again; maps of the neck are not."""
    entering = restandardised(student_BCHW, teacher_BCHW)
    out: Tensor = tail(functional.relu(entering) if rectify else entering)
    return out


class CrossKD(DistillationMethod):
    """The student's towers learn to make the teacher's head predict what it predicts."""

    class Config(MethodConfig):
        cls: float = Field(default=1.0, ge=0)
        """Weight of the classification loss."""
        box: float = Field(default=1.0, ge=0)
        """Weight of the box loss; each box counts by the teacher's highest probability for it."""
        convs: int = Field(default=3, ge=0)
        """Convolutions of each tower that the student's features have passed when they enter the teacher's; ours: a
        student with fewer gives its last."""
        beta: float = Field(default=1.0, ge=1)
        """Power of the distance between the probabilities."""
        box_loss: Literal["giou", "iou"] = "giou"
        """1 - GIoU, or -log IoU (published for FCOS)."""

    def __init__(self, config: CrossKD.Config, student: Detector, teacher: Detector | None) -> None:
        super().__init__(config, student, teacher)
        if (
            not isinstance(student, DenseDetector)
            or not isinstance(student.head, DenseHead)
            or student.tower_channels is None
            or not isinstance(teacher, RetinaNet)
        ):
            raise UserError(
                "method crosskd: it sends a tower that all levels of a dense student share through a RetinaNet teacher's "
                f"head, was given {kinds(student, teacher)}; for other pairs take pkd or head"
            )
        self.config = config
        own, depth = (len(head.classification_head.tower(0)) for head in (student.head, teacher.head))
        if config.convs > depth:
            raise UserError(
                f"method crosskd: features enter after {config.convs} convolutions, the teacher's towers have {depth}; "
                f"give convs: {depth} or less"
            )
        self.own_convs = min(config.convs, own)
        try:
            self.pairs = pair_levels(student.strides, teacher.strides)
        except ValueError as nothing:
            raise UserError(f"method crosskd: {nothing}") from nothing
        mine = (student.tower_channels if self.own_convs else student.channels[0],)
        theirs = (teacher.tower_channels if config.convs else teacher.channels[0],)
        # Towers are shared by all levels, and so is what bridges them.
        self.cls_adapter, self.box_adapter = adapters([(0, 0), (0, 0)], mine, theirs)

    def forward(self, batch: DistillationBatch) -> Mapping[str, Tensor]:
        config, teacher, predictions = self.config, batch.teacher, batch.teacher_predictions
        assert isinstance(batch.student, DenseDetector)
        assert isinstance(teacher, RetinaNet)
        assert isinstance(predictions, DensePredictions)
        weight_BA, positives = self._considered(teacher, predictions, batch.targets)
        sure_BA = predictions.logits_BAK.amax(2).sigmoid() * weight_BA
        parts = list(pairwise(accumulate(predictions.anchors.per_level, initial=0)))
        classification, box = [], []
        for s, t in self.pairs:
            level = slice(*parts[t])
            logits, boxes = self._reused(batch, teacher, predictions, s, t)
            focal = quality_focal(logits, predictions.logits_BAK[:, level].detach().sigmoid(), config.beta)
            classification.append((focal.sum(2) * weight_BA[:, level]).sum())
            error = box_error(boxes.flatten(0, 1), predictions.boxes_BA4[:, level].flatten(0, 1), config.box_loss)
            box.append((error * sure_BA[:, level].flatten()).sum())
        return {
            "cls": config.cls * sum(classification[1:], classification[0]) / positives,
            "box": config.box * sum(box[1:], box[0]) / positives,
        }

    def _reused(
        self, batch: DistillationBatch, teacher: RetinaNet, predictions: DensePredictions, s: int, t: int
    ) -> tuple[Tensor, Tensor]:
        """Logits (B, a, K) and decoded boxes (B, a, 4) of the teacher's anchors of level `t`, from the student's level `s`."""
        assert isinstance(batch.student, DenseDetector)
        assert isinstance(batch.student.head, DenseHead)
        mine, theirs = batch.features.levels[s], batch.teacher_features.levels[t]
        own, guide = batch.student.head, teacher.head
        tower, output = guide.classification_head.tower(t), guide.classification_head.cls_logits
        logits = self._crossed(own.classification_head.tower(s), tower, output, self.cls_adapter, mine, theirs)
        tower, output = guide.regression_head.tower(t), guide.regression_head.bbox_reg
        deltas = by_anchor(
            self._crossed(own.regression_head.tower(s), tower, output, self.box_adapter, mine, theirs), 4
        )
        begin = sum(predictions.anchors.per_level[:t])
        anchors = predictions.anchors.boxes_A4[begin : begin + deltas.shape[1]].repeat(len(deltas), 1)
        boxes: Tensor = teacher.coder.decode_single(deltas.flatten(0, 1), anchors)
        return by_anchor(logits, teacher.classes), boxes.view_as(deltas)

    def _crossed(
        self,
        own: nn.Sequential,
        tower: nn.Sequential,
        output: nn.Module,
        adapter: nn.Module,
        mine: Tensor,
        theirs: Tensor,
    ) -> Tensor:
        """The teacher's `output` of one branch, from the student's neck map; towers' beginnings are computed once more,
        since predictions hold their last maps only."""
        convs = self.config.convs
        held = resized(adapter(own[: self.own_convs](mine)), theirs.shape[-2:])
        with torch.no_grad():
            wanted = tower[:convs](theirs)
        return crossed(nn.Sequential(*tower[convs:], output), held, wanted, rectify=convs > 0)

    def _considered(self, teacher: RetinaNet, predictions: DensePredictions, targets: Targets) -> tuple[Tensor, Tensor]:
        """(B, A): 0 for anchors between background and object, else 1; and how many anchors are objects, at least 1.

        Ours: by the teacher's anchors and matching, where the original takes the student's, so that both may differ.
        """
        anchors = predictions.anchors.boxes_A4
        weight = torch.ones_like(predictions.logits_BAK[..., 0])
        positives = weight.new_zeros(())
        for row, truth in zip(weight, targets.boxes, strict=True):
            if len(truth):
                match = teacher.matcher(box_iou(truth, anchors))
                row[match == Matcher.BETWEEN_THRESHOLDS] = 0
                positives += (match >= 0).sum()
        return weight, positives.clamp(min=1)
