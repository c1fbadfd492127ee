"""Task-adaptive distillation (arXiv 2006.13108): features near objects, and the teacher's heads only where it does better.

Published without code. Known from abstract and quotations: proposals are shared, so that both heads judge the same RoIs;
a Gaussian mask over the ground truth weighs the features; classes and boxes are transferred where the teacher performs
better; the weight of it all decays. Loss weights and exact gates are not public: settings that begin with "Ours".

    L = r(e) * (feature * L_feat + classification * L_cls + regression * L_reg)        r(e) = 1 - e / E
    L_feat = sum_l 1 / (2 N_l) sum M_l (f(S_l) - sg[T_l])^2        N_l = channels * sum M_l, 1 at least; M: the mask
    L_cls  = mean over RoIs with gate g_i of sum_c BCE(pS_c, sg[pT_c])
    L_reg  = mean over RoIs on objects with gate u_i of smooth L1(dS, sg[dT]), deltas of the true class

Two detectors with a second stage get all of it. Two dense detectors of one kind and one grid (ours) are judged at the
anchors that stand for objects. Of two different heads only the features compare: set classification and regression to 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.ops import box_iou

from pipeline.errors import UserError
from stages.detection.detector import DenseDetector, Detector, RoIDetector
from stages.detection.overlap import paired_iou
from stages.detection.records import DensePredictions, RoIActivations, RoIPredictions, RoIs, Targets
from stages.detection.roi_head import RoIHead, roi_level
from stages.distillation.method import DistillationBatch, DistillationMethod, MethodConfig
from stages.distillation.pairing import adapters, pair_levels, resized
from stages.training.clock import Clock

Decay = Literal["epoch", "iteration", "cosine", "none"]
ClassGate = Literal["better", "correct"]
BoxGate = Literal["improves_proposal", "beats_student"]


@torch.no_grad()
def gaussian_mask(boxes_N4: Tensor, shape: tuple[int, int], stride: float, variance: float = 2.0) -> Tensor:
    """(rows, columns) of `shape` in [0, 1]: the largest of all boxes' Gaussians at each cell's centre, 0 outside the boxes.

    A Gaussian is 1 in the centre of its box and exp(-1 / variance) in the middle of an edge. Boxes are xyxy in pixels;
    centres of cells lie at (i + 1/2) * stride. A box in which no centre lies marks the cell its own centre is in.
    """
    dtype = torch.promote_types(boxes_N4.dtype, torch.float32)
    mask = boxes_N4.new_zeros(shape, dtype=dtype)
    if not len(boxes_N4):
        return mask
    centre_N2 = (boxes_N4[:, :2] + boxes_N4[:, 2:]).to(dtype) / 2
    half_N2 = (boxes_N4[:, 2:] - boxes_N4[:, :2]).to(dtype) / 2
    profiles = []
    for axis, count in ((1, shape[0]), (0, shape[1])):
        cells = (torch.arange(count, device=mask.device, dtype=dtype) + 0.5) * stride
        distance = cells[None] - centre_N2[:, axis, None]
        half = half_N2[:, axis, None]
        bell = torch.exp(-(distance / half.clamp(min=1e-6)).square() / variance)
        profiles.append(bell * (distance.abs() <= half))
    per_box = profiles[0][:, :, None] * profiles[1][:, None]
    missed = per_box.flatten(1).amax(1) == 0
    limits = torch.tensor([shape[1] - 1, shape[0] - 1], device=mask.device)
    column, row = torch.minimum((centre_N2[missed] / stride).floor().long().clamp(min=0), limits).T
    mask = per_box.amax(0)
    mask[row, column] = 1
    return mask


def masked_difference(adapted_BCHW: Tensor, teacher_BCHW: Tensor, mask_BHW: Tensor) -> Tensor:
    """1 / (2 N) times the sum of mask * squared difference, N = channels * sum of the mask, 1 at least."""
    squared_BHW = (adapted_BCHW - teacher_BCHW.detach()).square().sum(1)
    count = (adapted_BCHW.shape[1] * mask_BHW.sum()).clamp(min=1)
    return (mask_BHW * squared_BHW).sum() / (2 * count)


def gated_mean(loss_M: Tensor, gate_M: Tensor) -> Tensor:
    """Mean of the rows whose gate is open; 0, with a zero gradient, where none is."""
    return (loss_M * gate_M).sum() / gate_M.sum().clamp(min=1)


def class_transfer(
    student_MC: Tensor, teacher_MC: Tensor, label_M: Tensor, gate: ClassGate, divergence: Literal["bce", "kl"]
) -> Tensor:
    """Divergence of the probabilities summed over classes, mean over the rows in which the teacher gives the true class
    `label_M` more than the student does (`better`) or the most of all classes (`correct`)."""
    teacher_MC = teacher_MC.detach()
    if gate == "better":
        true = label_M[:, None]
        open_M = (teacher_MC.gather(1, true) > student_MC.detach().gather(1, true))[:, 0]
    else:
        open_M = teacher_MC.argmax(1) == label_M
    mine, theirs = student_MC.clamp(1e-6, 1 - 1e-6), teacher_MC.clamp(1e-6, 1 - 1e-6)
    if divergence == "bce":
        rows = functional.binary_cross_entropy(mine, theirs, reduction="none").sum(1)
    else:
        rows = (theirs * (theirs.log() - mine.log())).sum(1)
    return gated_mean(rows, open_M.to(rows.dtype))


@dataclass(frozen=True)
class Judgements:
    """What both detectors say of the same M places: `student_MC`, `teacher_MC` probabilities, `label_M` the true column.
    Of the P places on objects: deltas of the true class, boxes (xyxy, pixels, inside the image) before regression, after
    the student's and after the teacher's, and the object's."""

    student_MC: Tensor
    teacher_MC: Tensor
    label_M: Tensor
    student_deltas_P4: Tensor
    teacher_deltas_P4: Tensor
    start_P4: Tensor
    student_boxes_P4: Tensor
    teacher_boxes_P4: Tensor
    object_P4: Tensor


def box_transfer(rows: Judgements, gate: BoxGate, beta: float) -> Tensor:
    """Smooth L1 of the deltas summed over the four, mean over the places where the teacher's box overlaps the object more
    than the box before regression did (`improves_proposal`), or than the student's does (`beats_student`)."""
    with torch.no_grad():
        reached = rows.start_P4 if gate == "improves_proposal" else rows.student_boxes_P4
        better_P = paired_iou(rows.teacher_boxes_P4, rows.object_P4) > paired_iou(reached, rows.object_P4)
    wanted = rows.teacher_deltas_P4.detach()
    loss_P = functional.smooth_l1_loss(rows.student_deltas_P4, wanted, beta=beta, reduction="none").sum(1)
    return gated_mean(loss_P, better_P.to(loss_P.dtype))


def clipped(boxes_P4: Tensor, image_P: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
    """Boxes inside their images, whose `sizes` are (height, width)."""
    limits_B4 = boxes_P4.new_tensor([[width, height, width, height] for height, width in sizes])
    return torch.minimum(boxes_P4.clamp(min=0), limits_B4[image_P])


def judged_rois(
    student: RoIActivations, teacher: RoIActivations, rois: RoIs, coder: BoxCoder, sizes: Sequence[tuple[int, int]]
) -> Judgements:
    """Two second stages on the same RoIs; column 0 is the background."""
    label_M = rois.labels_M + 1
    on = torch.where(label_M > 0)[0]
    # A head may have one box for all classes.
    mine, theirs = (d[on, label_M[on] if d.shape[1] > 1 else 0] for d in (student.deltas, teacher.deltas))
    start, image = rois.boxes_M4[on], rois.image_M[on]
    with torch.no_grad():
        boxes, their_boxes = (clipped(coder.decode_single(d, start).view(-1, 4), image, sizes) for d in (mine, theirs))
    return Judgements(
        student.logits.softmax(1),
        teacher.logits.softmax(1),
        label_M,
        mine,
        theirs,
        start,
        boxes,
        their_boxes,
        rois.matched_M4[on],
    )


def judged_anchors(student: DensePredictions, teacher: DensePredictions, targets: Targets) -> Judgements:
    """Two dense heads at the anchors that stand for objects: IoU 0.5, and each object's best anchors (RetinaNet's rule).
    Background is left out: its tens of thousands of anchors would drown the objects."""
    anchors_A4, matcher = student.anchors.boxes_A4, Matcher(0.5, 0.4, allow_low_quality_matches=True)
    parts = []
    for number, (objects, names) in enumerate(zip(targets.boxes, targets.labels, strict=True)):
        if len(objects):
            match = matcher(box_iou(objects.to(anchors_A4.dtype), anchors_A4))
            on = torch.where(match >= 0)[0]
            parts.append((torch.full_like(on, number), on, names[match[on]], objects[match[on]].to(anchors_A4.dtype)))
    none = torch.zeros(0, dtype=torch.int64, device=anchors_A4.device)
    parts = parts or [(none, none, none, anchors_A4.new_zeros(0, 4))]
    image, anchor, label, truth = (torch.cat(column) for column in zip(*parts, strict=True))
    return Judgements(
        student.logits_BAK[image, anchor].sigmoid(),
        teacher.logits_BAK[image, anchor].sigmoid(),
        label,
        student.deltas_BA4[image, anchor],
        teacher.deltas_BA4[image, anchor],
        anchors_A4[anchor],
        clipped(student.boxes_BA4[image, anchor].detach(), image, targets.sizes),
        clipped(teacher.boxes_BA4[image, anchor].detach(), image, targets.sizes),
        truth,
    )


def joined(first: RoIs, second: RoIs) -> RoIs:
    """Both sets, one after the other, each with the labels it was sampled with."""
    return RoIs(*(torch.cat([getattr(first, f.name), getattr(second, f.name)]) for f in fields(RoIs)))


def decayed(kind: Decay, clock: Clock) -> float:
    """The share r of the weights that is left: from 1 to 1 / E by epochs, to 0 by iterations, in a half cosine by epochs,
    or 1 for ever."""
    if kind == "none":
        return 1.0
    if kind == "iteration":
        return max(0.0, 1 - clock.iteration / clock.iterations)
    passed = clock.epoch / math.ceil(clock.iterations / clock.iterations_per_epoch)
    return 1 - passed if kind == "epoch" else 0.5 * math.cos(math.pi * passed) + 0.5


class TaskAdaptive(DistillationMethod):
    """Masked features, gated classes and boxes, decaying weights."""

    class Config(MethodConfig):
        feature: float = Field(default=1.0, ge=0)
        """Weight of the features. Ours: the source's weights are not public."""
        classification: float = Field(default=1.0, ge=0)
        """Ours: weight of the classes."""
        regression: float = Field(default=1.0, ge=0)
        """Ours: weight of the boxes."""
        decay: Decay = "epoch"
        """How all weights fall to 0: linearly, a step an epoch; linearly, every iteration; in a half cosine; not."""
        share: Literal["student", "teacher", "both"] = "student"
        """Whose RoIs both second stages judge. Each set keeps the labels it was sampled with."""
        class_gate: ClassGate = "better"
        """Ours: classes are transferred where the teacher gives the true class more than the student does, or where it is
        the teacher's first."""
        class_loss: Literal["bce", "kl"] = "bce"
        """Ours: binary cross entropy over the classes' probabilities, or Kullback-Leibler divergence."""
        box_gate: BoxGate = "improves_proposal"
        """Boxes are transferred where the teacher's is better than the RoI or anchor; or (ours) than the student's."""
        box_beta: float = Field(default=1.0, gt=0)
        """Ours: where smooth L1 turns from square to linear, in deltas as the heads give them."""
        variance: float = Field(default=2.0, gt=0)
        """Ours: width of the mask; 2 leaves 0.61 in the middle of a box's edge."""
        adapters: Literal["separate", "needed"] = "separate"
        """Ours: a 1x1 convolution on every level of the student, or only where channels differ."""
        levels: Literal["all", "own"] = "all"
        """Ours: a box marks all levels, or the one that RoIs of its size are read from."""

        @model_validator(mode="after")
        def _something(self) -> TaskAdaptive.Config:
            if not (self.feature or self.classification or self.regression):
                raise ValueError("feature, classification and regression are all 0, so nothing is taught; raise one")
            return self

    def __init__(self, config: TaskAdaptive.Config, student: Detector, teacher: Detector | None) -> None:
        super().__init__(config, student, teacher)
        assert teacher is not None
        self.config = config
        if (config.classification or config.regression) and not comparable(student, teacher):
            raise UserError(
                f"method task_adaptive: the heads cannot be compared, the student is {described(student)}, the teacher "
                f"{described(teacher)}; take two with one RoI head each, or two dense ones of one kind with "
                "one grid of anchors, or set classification: 0 and regression: 0 for features only"
            )
        self.strides = student.strides
        try:
            self.pairs = pair_levels(student.strides, teacher.strides) if config.feature else []
        except ValueError as problem:
            raise UserError(f"method task_adaptive: {problem}") from problem
        self.adapters = adapters(self.pairs, student.channels, teacher.channels, config.adapters == "separate")

    def forward(self, batch: DistillationBatch) -> Mapping[str, Tensor]:
        config, terms = self.config, {}
        if config.feature:
            terms["feature"] = config.feature * self.feature_loss(batch)
        if config.classification or config.regression:
            rows = self.judgements(batch)
            loss = class_transfer(rows.student_MC, rows.teacher_MC, rows.label_M, config.class_gate, config.class_loss)
            terms["cls"] = config.classification * loss
            terms["box"] = config.regression * box_transfer(rows, config.box_gate, config.box_beta)
        left = decayed(config.decay, batch.clock)
        return {name: left * term for name, term in terms.items()}

    def feature_loss(self, batch: DistillationBatch) -> Tensor:
        """Summed over levels of equal stride."""
        terms = []
        for adapter, (s, t) in zip(self.adapters, self.pairs, strict=True):
            theirs = batch.teacher_features.levels[t]
            mine = resized(adapter(batch.features.levels[s]), theirs.shape[-2:])
            shape = (theirs.shape[-2], theirs.shape[-1])
            marking = [boxes[self.marks(boxes, s)] for boxes in batch.targets.boxes]
            masks = [gaussian_mask(boxes, shape, self.strides[s], self.config.variance) for boxes in marking]
            terms.append(masked_difference(mine, theirs, torch.stack(masks).to(mine.dtype)))
        return torch.stack(terms).sum()

    def marks(self, boxes_N4: Tensor, level: int) -> Tensor:
        """Which boxes mark the student's level: all, or those that would be pooled from it (arXiv 1612.03144, eq. 1: up to
        twice 14 cells a side from the finest, each doubling one coarser)."""
        if self.config.levels == "all":
            return torch.ones(len(boxes_N4), dtype=torch.bool, device=boxes_N4.device)
        return roi_level(boxes_N4, 14 * self.strides[0], len(self.strides)) == level

    def judgements(self, batch: DistillationBatch) -> Judgements:
        """What both say of the shared RoIs, or of the anchors on objects."""
        mine = batch.predictions
        if isinstance(mine, DensePredictions):
            theirs = batch.teacher_predictions
            assert isinstance(theirs, DensePredictions)
            return judged_anchors(mine, theirs, batch.targets)
        assert isinstance(mine, RoIPredictions)
        assert isinstance(batch.student, RoIDetector)
        assert isinstance(batch.teacher, RoIDetector)
        share, rois = self.config.share, mine.rois
        if share != "student":
            with torch.no_grad():
                theirs = batch.teacher.predict(batch.teacher_features, batch.targets)
            rois = theirs.rois if share == "teacher" else joined(mine.rois, theirs.rois)
        with torch.no_grad():
            wanted = batch.teacher.roi_head(batch.teacher_features, rois)
        own = mine.activations if share == "student" else batch.student.roi_head(batch.features, rois)
        return judged_rois(own, wanted, rois, batch.teacher.roi_heads.coder, batch.targets.sizes)


def comparable(student: Detector, teacher: Detector) -> bool:
    """Whether both heads speak of the same places in the same terms: one RoI head each (no cascade) with deltas of one
    scale, or dense heads of one kind on one grid."""
    if isinstance(student, RoIDetector) and isinstance(teacher, RoIDetector):
        single = len(roi_heads(student)) == len(roi_heads(teacher)) == 1
        return single and student.roi_heads.coder.weights == teacher.roi_heads.coder.weights
    if isinstance(student, DenseDetector) and isinstance(teacher, DenseDetector):
        grids = [(type(each), each.strides, each.per_cell) for each in (student, teacher)]
        return grids[0] == grids[1]
    return False


def roi_heads(detector: Detector) -> list[RoIHead]:
    """All RoI heads of a detector."""
    return [module for module in detector.modules() if isinstance(module, RoIHead)]


def described(detector: Detector) -> str:
    """Kind, strides, anchors a cell or RoI heads, for a message."""
    if isinstance(detector, DenseDetector):
        head = f"{detector.per_cell} anchors a cell"
    else:
        weights = [head.coder.weights for head in roi_heads(detector)]
        head = f"RoI heads with deltas times {weights}"
    return f"{type(detector).__name__} with strides {list(detector.strides)}, {head}"
