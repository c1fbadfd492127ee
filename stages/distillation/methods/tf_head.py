"""TF-HEAD, HEAD without a teacher (arXiv 2207.05345; LutingWang/HEAD, branch dev, configs/kd/head_r18.py).

    student's pyramid --> each assistant --> its own loss on the ground truth, and nothing else
                   |          '--last hidden layer, detached--> CKD
                   '--> class tower ----------------------------'

    L = L_student + sum over assistants a of  rho(t) * L_a  +  c_a * omega(t) * MSE(A_a tower, sg[hidden layer of a])
    rho(t) = min(t / warmup, 1)     omega(t) = rho(t) until the first drop of the learning rate, 0 after it

The student's backbone gains twice: from the assistants' own losses, which reach it through the neck, and from CKD, which
reaches it through the tower and never reaches an assistant: one that followed the student would have nothing to tell.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn

from pipeline.config import BaseConfig, Choice
from pipeline.errors import UserError
from stages.detection.detector import DenseDetector, Detector
from stages.detection.records import DensePredictions
from stages.distillation.assistant import Assistant, RoISettings
from stages.distillation.imitation import layer_imitation
from stages.distillation.method import DistillationBatch, DistillationMethod
from stages.training.clock import Clock, stopped, warmed
from stages.training.optimizer import OptimizerConfig


class Assisted(BaseConfig):
    """One assistant and its weight."""

    assistant: Choice[Assistant]
    """The head on the student's features; it begins with random weights."""
    ckd: float = Field(default=1.0, ge=0)
    """Weight of the imitation of its last hidden layer by the student's class tower; 0 leaves its own losses only."""
    ckd_adapter: Literal["shared", "per_anchor"] = "shared"
    """One linear layer for all anchors of a cell; or one for each, for an assistant that looks at RoIs."""


def published() -> dict[str, Assisted]:
    """The two assistants of a RetinaNet, as published."""
    rcnn: Choice[Assistant] = Choice.parse(Assistant, "rcnn")
    fcos: Choice[Assistant] = Choice.parse(Assistant, {"name": "fcos", "weight": 0.5})
    return {"rcnn": Assisted(assistant=rcnn, ckd=1.3, ckd_adapter="per_anchor"), "fcos": Assisted(assistant=fcos)}


class TFHEAD(DistillationMethod):
    """Assistants of other kinds that nobody taught, and what the student's class tower learns from them."""

    needs_teacher = False

    class Config(RoISettings):
        assistants: dict[str, Assisted] = Field(default_factory=published)
        """Any name to an assistant; several act together."""
        warmup: int = Field(default=2000, ge=0)
        """Iterations over which all of it rises from 0."""
        until: float | None = Field(default=None, gt=0, le=1)
        """Share of the training after which CKD stops; at the first drop of the learning rate if none, as published."""
        normalise: bool = False
        """Ours: divide each imitation loss by the mean square of its target, for assistants whose features are large."""

    def __init__(self, config: TFHEAD.Config, student: Detector, teacher: Detector | None) -> None:
        super().__init__(config, student, teacher)
        if not isinstance(student, DenseDetector):
            raise UserError(
                f"method tf_head: it teaches the class tower of a dense student, and {type(student).__name__} has none; "
                "take a retinanet"
            )
        self.config = config
        chosen = {name: one.assistant for name, one in config.assistants.items()}
        # A teacher that other methods of the training have is none of its business.
        built = {name: choice.cls.build(choice.config, student, None) for name, choice in chosen.items()}
        self.assistants = nn.ModuleDict(built)
        self.ckd_adapters = nn.ModuleDict(
            {
                name: built[name].ckd_adapter(student, one.ckd_adapter == "per_anchor")
                for name, one in config.assistants.items()
                if one.ckd
            }
        )

    @classmethod
    def misconfigured(cls, config: Any, optimizer: OptimizerConfig) -> str | None:
        drops = optimizer.schedule == "step" and optimizer.milestones
        if drops or config.until is not None or not any(one.ckd for one in config.assistants.values()):
            return None
        return (
            f"its CKD stops at the first drop of the learning rate, and the schedule {optimizer.schedule} has none; "
            "set optimizer.schedule: step, or until: 0.67 for two thirds of the training"
        )

    def last(self, clock: Clock) -> int:
        """The last iteration with CKD; the end of a training without milestones, which `misconfigured` refuses."""
        until: float | None = self.config.until
        if until is not None:
            return round(until * clock.iterations)
        return clock.milestones[0] if clock.milestones else clock.iterations

    def forward(self, batch: DistillationBatch) -> Mapping[str, Tensor]:
        config, clock = self.config, batch.clock
        assert isinstance(batch.predictions, DensePredictions)
        risen = warmed(1.0, clock, config.warmup)
        losses: dict[str, Tensor] = {}
        for name, one in config.assistants.items():
            assistant = self.assistants[name]
            assert isinstance(assistant, Assistant)
            assistance = assistant(batch, config)
            losses |= {f"{name}_{term}": risen * loss for term, loss in assistance.losses.items()}
            if one.ckd:
                target = assistance.hidden[-1]
                pair = assistant.cross(self.ckd_adapters[name], batch.predictions, assistance, target)
                weight = stopped(one.ckd * risen, clock, self.last(clock))
                losses[f"{name}_ckd"] = weight * layer_imitation(*pair, config.normalise)
        return losses
