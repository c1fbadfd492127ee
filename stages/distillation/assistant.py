"""What an assistant is: a head of another kind on the student's features, with losses of its own.

It stands between a student and what its own head has nothing in common with (arXiv 2207.05345). A teacher's hidden
layers can be compared with the assistant's, which are of the same kind, and through the assistant the gradient reaches
the student's backbone. Assistants live inside a method and are dropped with it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor, nn

from pipeline.config import BaseConfig
from pipeline.errors import UserError
from stages.detection.detector import DenseDetector, Detector
from stages.detection.proposals import SamplingSettings
from stages.detection.records import DensePredictions, Features, ProposalSettings, RoIs
from stages.distillation.adapter import PerAnchorLinear
from stages.distillation.imitation import Layer, gather_cells
from stages.distillation.method import DistillationBatch, MethodConfig


class RoISettings(MethodConfig):
    """Settings of a method whose assistants look at regions of interest."""

    proposals_before_nms: int = Field(default=2000, ge=1)
    """Student's proposals kept a level before NMS."""
    proposals: int = Field(default=1000, ge=1)
    """Student's proposals kept an image after NMS."""
    rois: int = Field(default=512, ge=2)
    """RoIs an image, a quarter of them on objects at most."""

    def choose(self, batch: DistillationBatch) -> RoIs:
        """The student's own proposals, detached, sampled with the ground truth (NMS at IoU 0.7, as published)."""
        found = ProposalSettings(self.proposals_before_nms, 0.7, self.proposals)
        return batch.rois(found, SamplingSettings(self.rois))


@dataclass(frozen=True)
class Assistance:
    """What an assistant made of one batch: its own `losses` against the ground truth, its `hidden` layers, of which the
    last is what the student's class tower may imitate, and the `rois` of each of its stages (none if it has no RoIs)."""

    losses: Mapping[str, Tensor]
    hidden: tuple[Layer, ...]
    rois: tuple[RoIs, ...] = ()


class Assistant(nn.Module, ABC):
    """A head on the student's features; `widths` are the channels of its hidden layers, and of a teacher's it asks."""

    Config: ClassVar[type[BaseConfig]] = BaseConfig
    widths: tuple[int, ...]

    @classmethod
    @abstractmethod
    def build(cls, config: Any, student: Detector, teacher: Detector | None) -> Assistant:
        """An assistant for this student: of the teacher's shape where there is one, else of the shape in its settings.

        Raises UserError where the teacher's head is of another kind.
        """

    @abstractmethod
    def forward(self, batch: DistillationBatch, settings: RoISettings) -> Assistance:
        """What the assistant makes of the student's features."""

    @abstractmethod
    def ask(self, teacher: Detector, features: Features, assistance: Assistance) -> tuple[Layer, ...]:
        """The teacher's hidden layers that stand beside `assistance.hidden`, from the teacher's `features`."""

    @abstractmethod
    def akd_adapters(self) -> nn.ModuleList:
        """A linear layer of random weights for each hidden layer, from the assistant's to the teacher's."""

    @abstractmethod
    def ckd_adapter(self, student: DenseDetector, per_anchor: bool) -> nn.Module:
        """A linear layer of random weights from the student's class tower to the last hidden layer."""

    @abstractmethod
    def cross(
        self, adapter: nn.Module, predictions: DensePredictions, assistance: Assistance, target: Layer
    ) -> tuple[Layer, Layer]:
        """The student's class tower, adapted, and the `target` (a layer such as the last hidden one) where both exist."""


def level_adapters(student: tuple[int, ...], head: int) -> nn.ModuleList:
    """What brings levels of the `student`'s channels to those that a `head` reads: nothing where they agree.

    Ours: the published pairs share 256 channels; a 1x1 convolution bridges others.
    """
    return nn.ModuleList(nn.Identity() if channels == head else nn.Conv2d(channels, head, 1) for channels in student)


def tower_channels(student: DenseDetector) -> int:
    """Channels of the student's class tower. Raises UserError where they differ from level to level."""
    if student.tower_channels is None:
        raise UserError(
            f"ckd compares one class tower, and those of {type(student).__name__} differ from level to level; set ckd: 0"
        )
    return student.tower_channels


class RoIAssistant(Assistant):
    """An assistant whose hidden layers have a row for each RoI."""

    def akd_adapters(self) -> nn.ModuleList:
        return nn.ModuleList(nn.Linear(width, width) for width in self.widths)

    def ckd_adapter(self, student: DenseDetector, per_anchor: bool) -> nn.Module:
        return PerAnchorLinear(tower_channels(student), self.widths[-1], student.per_cell if per_anchor else 1)

    def cross(
        self, adapter: nn.Module, predictions: DensePredictions, assistance: Assistance, target: Layer
    ) -> tuple[Layer, Layer]:
        """The tower at the cell that each RoI came from; ground truth among the RoIs has no cell and is left out."""
        rois, per_cell = assistance.rois[-1], predictions.anchors.per_cell
        kept = rois.source_M >= 0
        source = rois.source_M[kept]
        rows = gather_cells(predictions.class_tower, rois.image_M[kept], source, per_cell)
        return (adapter(rows, source % per_cell),), (target[0][kept],)


class MapAssistant(Assistant):
    """An assistant whose hidden layers have a map for each level of the student; adapters are shared by the levels."""

    def akd_adapters(self) -> nn.ModuleList:
        return nn.ModuleList(nn.Conv2d(width, width, 1) for width in self.widths)

    def ckd_adapter(self, student: DenseDetector, per_anchor: bool) -> nn.Module:
        if per_anchor:
            raise UserError(
                f"assistant {type(self).__name__}: ckd_adapter per_anchor, but its maps have no anchors; set ckd_adapter: shared"
            )
        return nn.Conv2d(tower_channels(student), self.widths[-1], 1)

    def cross(
        self, adapter: nn.Module, predictions: DensePredictions, assistance: Assistance, target: Layer
    ) -> tuple[Layer, Layer]:
        """The tower of every level, whole."""
        return tuple(adapter(level) for level in predictions.class_tower), target
