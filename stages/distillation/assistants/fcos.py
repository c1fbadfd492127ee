"""The FCOS assistant: a head without anchors on the student's levels (TF-HEAD's second; LutingWang/HEAD, branch dev,
configs/kd/head_r18.py)."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from pipeline.config import BaseConfig
from pipeline.errors import UserError
from stages.detection.dense_head import DenseHead, Distances, TowerShape
from stages.detection.detector import Detector
from stages.detection.detectors.fcos import FCOS
from stages.detection.points import PointRules, point_grid, predict_points
from stages.detection.records import Features
from stages.distillation.assistant import Assistance, MapAssistant, RoISettings, level_adapters
from stages.distillation.imitation import Layer
from stages.distillation.method import DistillationBatch


class PointHeadConfig(BaseConfig):
    """Shape of an FCOS head, and which object its points learn."""

    convs: int = Field(default=4, ge=1, le=8)
    """Convolutions of each of the two towers."""
    channels: int | None = Field(default=None, ge=8)
    """Width of the towers; as wide as the student's levels where none is given."""
    centre_radius: float = Field(default=1.5, gt=0)
    """Points learn an object when they are this near to its centre, in strides, and inside it."""
    reach: float = Field(default=8.0, gt=0)
    """Distance from a point to the farthest side of its object up to which a level serves it, in strides."""


class FCOSAssistant(MapAssistant):
    """Two towers of convolutions with group normalisation; the box tower and the class tower are its hidden layers."""

    class Config(BaseConfig):
        weight: float = Field(default=1.0, ge=0)
        """Weight of its own losses: 1 where it is the only assistant, 0.5 beside an R-CNN one (as published)."""
        transfer: bool = True
        """Begin with the teacher's weights, where there is a teacher; without, the assistant starts from random ones."""
        head: PointHeadConfig | None = None
        """Its shape and rules where there is no teacher; with one it has the teacher's."""

    def __init__(self, config: FCOSAssistant.Config, student: Detector, teacher: FCOS | None) -> None:
        super().__init__()
        self.config = config
        if teacher:
            inside, width, convs = teacher.channels[0], teacher.tower_channels, teacher.config.head_convs
            kind, norm, kernel = teacher.config.head_kind, teacher.config.head_norm, teacher.config.head_kernel
            self.rules = teacher.rules
        else:
            inside = student.channels[0]
            shape = config.head or PointHeadConfig()
            width, convs = shape.channels or inside, shape.convs
            kind, norm, kernel = "plain", "group", 3
            self.rules = PointRules(shape.centre_radius, shape.reach)
        tower = TowerShape(inside, width, convs, kind, norm, len(student.strides), bias=True)
        self.head = DenseHead(tower, 1, student.classes, kernel, Distances())
        self.points = point_grid(student.strides)
        self.widths = (width, width)
        self.adapters = level_adapters(student.channels, inside)

    @classmethod
    def build(cls, config: Any, student: Detector, teacher: Detector | None) -> FCOSAssistant:
        if teacher is None:
            return cls(config, student, None)
        if not isinstance(teacher, FCOS):
            raise UserError(
                f"assistant fcos: needs an fcos teacher or none, was given {type(teacher).__name__}; take the assistant rcnn"
            )
        if teacher.strides != student.strides:
            raise UserError(
                f"assistant fcos: it is compared level by level, and {type(student).__name__} has the strides "
                f"{student.strides}, its teacher {teacher.strides}; give both the same extra_levels"
            )
        if config.head is not None:
            raise UserError("assistant fcos: its shape is the teacher's, and `head` is given too; leave `head` out")
        assistant = cls(config, student, teacher)
        if config.transfer:
            assistant.head.load_state_dict(teacher.head.state_dict())
        return assistant

    def forward(self, batch: DistillationBatch, settings: RoISettings) -> Assistance:
        """It looks everywhere: the settings of RoIs do not matter."""
        levels = tuple(adapter(level) for adapter, level in zip(self.adapters, batch.features.levels, strict=True))
        found = predict_points(self.head, levels, self.points(levels, batch.features.size))
        losses = {name: self.config.weight * loss for name, loss in self.rules.loss(found, batch.targets).items()}
        return Assistance(losses, (found.box_tower, found.class_tower))

    def ask(self, teacher: Detector, features: Features, assistance: Assistance) -> tuple[Layer, ...]:
        """The teacher's towers."""
        found = teacher.predict(features)
        return found.box_tower, found.class_tower
