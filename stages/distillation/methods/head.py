"""HEAD, distillation between detectors with different heads (arXiv 2207.05345; LutingWang/HEAD, branch refactor).

    student's pyramid --RoIAlign--> assistant --hidden layers--> AKD <-- teacher's RoI head on the same RoIs
                   |                    '--> its own loss on the ground truth
                   '--> class tower, at the cells the RoIs came from --> CKD <-- the teacher's last hidden layer

AKD reaches assistant, neck and backbone; CKD reaches tower, neck and backbone, never the assistant. RoIs are the
student's own proposals, detached, plus the ground truth (which has no cell, so CKD leaves it out).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config import Choice
from pipeline.errors import UserError
from stages.detection.detector import DenseDetector, DensePredictions, Detector, ProposalSettings, RoIDetector
from stages.detection.proposals import SamplingSettings
from stages.distillation.adapter import PerAnchorLinear
from stages.distillation.assistant import Assistant
from stages.distillation.method import DistillationBatch, DistillationMethod, MethodConfig
from stages.training.clock import warmed


def imitation(adapted: Tensor, target: Tensor, normalise: bool = False) -> Tensor:
    """Mean squared error over rows and features to the detached target; divided by the target's mean square if `normalise`.

    Without rows it is 0 with a zero gradient, where the original returns NaN.
    """
    target = target.detach()
    if not len(target):
        return adapted.sum() * 0.0
    loss = functional.mse_loss(adapted, target)
    return loss / target.square().mean().clamp(min=1e-6) if normalise else loss


def gather_cells(tower: tuple[Tensor, ...], image_M: Tensor, source_M: Tensor, per_cell: int) -> Tensor:
    """Rows (M, C) of the tower maps at the cells that the flat anchor indices `source_M` lie in."""
    cells_BCN = torch.cat([level.flatten(2) for level in tower], 2)
    return cells_BCN[image_M, :, torch.div(source_M, per_cell, rounding_mode="floor")]


class HEAD(DistillationMethod):
    """Assistant, AKD and CKD; `akd: 0` and `ckd: 0` leave the assistant only."""

    class Config(MethodConfig):
        assistant: Choice[Assistant] = Field(default_factory=lambda: Choice.parse(Assistant, {"name": "rcnn"}))
        """The head on the student's features."""
        akd: float = Field(default=2.0, ge=0)
        """Weight of the imitation of each of the teacher's hidden layers by the assistant's."""
        ckd: float = Field(default=2.0, ge=0)
        """Weight of the imitation of the teacher's last hidden layer by the student's class tower."""
        warmup: int = Field(default=2000, ge=0)
        """Iterations over which both weights rise from 0."""
        ckd_adapter: Literal["shared", "per_anchor"] = "shared"
        """One linear layer for all anchors of a cell (the released code), or one for each (the paper's experiments)."""
        normalise: bool = False
        """Ours: divide each imitation loss by the mean square of its target, for teachers whose features are large."""
        proposals_before_nms: int = Field(default=2000, ge=1)
        """Student's proposals kept a level before NMS."""
        proposals: int = Field(default=1000, ge=1)
        """Student's proposals kept an image after NMS."""
        rois: int = Field(default=512, ge=2)
        """RoIs an image, a quarter of them on objects at most."""

    def __init__(self, config: HEAD.Config, student: Detector, teacher: Detector | None) -> None:
        super().__init__(config, student, teacher)
        if problem := self.misfit(type(student), type(teacher) if teacher else None):
            raise UserError(f"method head: {problem}")
        assert isinstance(student, DenseDetector)
        assert isinstance(teacher, RoIDetector)
        self.config = config
        assistant = config.assistant
        self.assistant: Assistant = assistant.cls.build(assistant.config, student, teacher)
        width = self.assistant.hidden
        wide = teacher.roi_heads.config.hidden
        # Default (random) initialisation, as published: the imitation does not begin at zero.
        self.akd_adapters = nn.ModuleList(nn.Linear(w, wide) for w in width)
        anchors = student.per_cell if config.ckd_adapter == "per_anchor" else 1
        self.ckd_adapter = PerAnchorLinear(student.tower_channels, wide, anchors)
        self.proposal_settings = ProposalSettings(config.proposals_before_nms, 0.7, config.proposals)
        self.sampling = SamplingSettings(config.rois)

    @classmethod
    def misfit(cls, student: type[Detector], teacher: type[Detector] | None) -> str | None:
        if teacher and issubclass(student, DenseDetector) and issubclass(teacher, RoIDetector):
            return None
        kinds = f"{student.__name__} and {teacher.__name__ if teacher else 'no teacher'}"
        return (
            f"it pairs a dense student with a two-stage teacher, was given {kinds}; for detectors of one kind take pkd"
        )

    def forward(self, batch: DistillationBatch) -> Mapping[str, Tensor]:
        config, predictions = self.config, batch.predictions
        assert isinstance(predictions, DensePredictions)
        assert isinstance(batch.teacher, RoIDetector)
        rois = batch.rois(self.proposal_settings, self.sampling)
        activations = self.assistant(batch.features, rois)
        own = self.assistant.loss(activations, rois)
        losses = {f"assist_{name}": loss for name, loss in own.items()}
        if not config.akd and not config.ckd:
            return losses
        with torch.no_grad():
            wanted = batch.teacher.roi_head(batch.teacher_features, rois).hidden
        if config.akd:
            pairs = zip(self.akd_adapters, activations.hidden, wanted, strict=True)
            terms = [imitation(adapter(mine), theirs, config.normalise) for adapter, mine, theirs in pairs]
            losses["akd"] = warmed(config.akd, batch.clock, config.warmup) * sum(terms[1:], terms[0])
        if config.ckd:
            kept = rois.source_M >= 0
            source, per_cell = rois.source_M[kept], predictions.anchors.per_cell
            rows = gather_cells(predictions.class_tower, rois.image_M[kept], source, per_cell)
            adapted = self.ckd_adapter(rows, source % per_cell)
            loss = imitation(adapted, wanted[-1][kept], config.normalise)
            losses["ckd"] = warmed(config.ckd, batch.clock, config.warmup) * loss
        return losses
