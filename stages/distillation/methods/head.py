"""HEAD, distillation between detectors with different heads (arXiv 2207.05345; LutingWang/HEAD, branch refactor).

    student's pyramid --> assistant --hidden layers--> AKD <-- the same layers of the teacher's head
                   |          '--> its own loss on the ground truth                |
                   '--> class tower ------------------> CKD <-- the last of them --'

With an assistant that looks at RoIs, teacher and assistant see the same ones, and the tower is read at the cells that
they came from. AKD reaches assistant, neck and backbone; CKD reaches tower, neck and backbone, never the assistant.
RoIs are the student's own proposals, detached, plus the ground truth (which has no cell, so CKD leaves it out).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from pipeline.config import Choice
from pipeline.errors import UserError
from stages.detection.detector import DenseDetector, Detector, RoIDetector
from stages.detection.records import DensePredictions
from stages.distillation.assistant import Assistant, RoISettings
from stages.distillation.imitation import layer_imitation
from stages.distillation.method import DistillationBatch, DistillationMethod, kinds
from stages.training.clock import stopped, warmed


class HEAD(DistillationMethod):
    """Assistant, AKD and CKD; `ckd: 0` leaves assistant and AKD, `akd: 0` and `ckd: 0` the assistant only."""

    class Config(RoISettings):
        assistant: Choice[Assistant] = Field(default_factory=lambda: Choice.parse(Assistant, {"name": "rcnn"}))
        """The head on the student's features."""
        akd: float = Field(default=2.0, ge=0)
        """Weight of the imitation of each of the teacher's hidden layers by the assistant's."""
        ckd: float = Field(default=2.0, ge=0)
        """Weight of the imitation of the teacher's last layer by the student's class tower; a two-stage student needs 0."""
        warmup: int = Field(default=2000, ge=0)
        """Iterations over which both weights rise from 0."""
        ckd_warmup: int | None = Field(default=None, ge=0)
        """The same for CKD alone; as `warmup` if none (the paper's experiments: 0, with per-anchor adapters)."""
        ckd_until: float | None = Field(default=None, gt=0, le=1)
        """Share of the training after which CKD stops; at its end if none (published for an FCOS student: 11 of 12)."""
        ckd_adapter: Literal["shared", "per_anchor"] = "shared"
        """One linear layer for all anchors of a cell (the released code), or one for each (the paper's experiments)."""
        assistant_warmup: int = Field(default=0, ge=0)
        """Iterations over which the assistant's own losses rise from 0 (the paper's experiments: 2000)."""
        normalise: bool = False
        """Ours: divide each imitation loss by the mean square of its target, for teachers whose features are large."""

    def __init__(self, config: HEAD.Config, student: Detector, teacher: Detector | None) -> None:
        super().__init__(config, student, teacher)
        two_stage, one_kind = isinstance(teacher, RoIDetector), type(student) is type(teacher)
        if teacher is None or one_kind or not (isinstance(student, DenseDetector) or two_stage):
            raise UserError(
                "method head: it pairs a dense student with a teacher of another kind, or two two-stage detectors, was "
                f"given {kinds(student, teacher)}; for detectors of one kind take pkd"
            )
        self.config = config
        self.assistant: Assistant = config.assistant.cls.build(config.assistant.config, student, teacher)
        # Default (random) initialisation, as published: the imitation does not begin at zero.
        if config.akd:
            self.akd_adapters = self.assistant.akd_adapters()
        if config.ckd:
            if not isinstance(student, DenseDetector):
                raise UserError(
                    f"method head: ckd {config.ckd:g} compares a dense student's class tower, and {type(student).__name__} "
                    "has none; set ckd: 0"
                )
            self.ckd_adapter = self.assistant.ckd_adapter(student, config.ckd_adapter == "per_anchor")

    def forward(self, batch: DistillationBatch) -> Mapping[str, Tensor]:
        config, clock = self.config, batch.clock
        assistance = self.assistant(batch, config)
        losses = {
            f"assist_{name}": warmed(1.0, clock, config.assistant_warmup) * loss
            for name, loss in assistance.losses.items()
        }
        if not config.akd and not config.ckd:
            return losses
        assert batch.teacher is not None
        with torch.no_grad():
            wanted = self.assistant.ask(batch.teacher, batch.teacher_features, assistance)
        if config.akd:
            terms = [
                layer_imitation(tuple(adapter(part) for part in mine), theirs, config.normalise)
                for adapter, mine, theirs in zip(self.akd_adapters, assistance.hidden, wanted, strict=True)
            ]
            losses["akd"] = warmed(config.akd, clock, config.warmup) * torch.stack(terms).sum()
        if config.ckd:
            assert isinstance(batch.predictions, DensePredictions)
            pair = self.assistant.cross(self.ckd_adapter, batch.predictions, assistance, wanted[-1])
            warmup = config.warmup if config.ckd_warmup is None else config.ckd_warmup
            weight = warmed(config.ckd, clock, warmup)
            if config.ckd_until is not None:
                weight = stopped(weight, clock, round(config.ckd_until * clock.iterations))
            losses["ckd"] = weight * layer_imitation(*pair, config.normalise)
        return losses
