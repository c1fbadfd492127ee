"""The R-CNN assistant: a Faster R-CNN's second stage on the student's pyramid (HEAD's published assistant)."""

from __future__ import annotations

from typing import Any, Literal

from pipeline.config import BaseConfig
from pipeline.errors import UserError
from stages.detection.detector import Detector, RoIDetector
from stages.detection.records import Features, RoIActivations
from stages.detection.roi_head import RoIHead, RoIHeadConfig
from stages.distillation.assistant import Assistance, RoIAssistant, RoISettings, level_adapters
from stages.distillation.imitation import Layer
from stages.distillation.method import DistillationBatch

BOX_LOSS_BETA = {"smooth_l1": 1 / 9, "l1": 0.0}  # where the square ends; torchvision's, and mmdet's absolute error


class RCNN(RoIAssistant):
    """An RoI head that reads the student's level of the same index as a teacher's (twice as coarse if that begins at P3)."""

    class Config(BaseConfig):
        transfer: bool = True
        """Begin with the teacher's weights, where there is a teacher; without, the assistant starts from random ones."""
        head: RoIHeadConfig | None = None
        """Its shape where there is no teacher; with one it has the teacher's."""
        box_loss: Literal["smooth_l1", "l1"] = "smooth_l1"
        """Its own loss on boxes: torchvision's smooth L1, or L1 as in HEAD's code."""

    def __init__(self, config: RCNN.Config, student: Detector, head: RoIHead) -> None:
        super().__init__()
        self.config = config
        self.head = head
        self.widths = (head.config.hidden,) * 2
        self.adapters = level_adapters(student.channels[: len(head.strides)], head.channels)

    @classmethod
    def build(cls, config: Any, student: Detector, teacher: Detector | None) -> RCNN:
        if teacher is None:
            shape = config.head or RoIHeadConfig()
            return cls(config, student, RoIHead(shape, student.channels[0], student.strides, student.classes))
        if not isinstance(teacher, RoIDetector):
            raise UserError(
                f"assistant rcnn: needs a two-stage teacher, was given {type(teacher).__name__}; take a faster_rcnn teacher"
            )
        if config.head is not None:
            raise UserError("assistant rcnn: its shape is the teacher's, and `head` is given too; leave `head` out")
        assistant = cls(config, student, teacher.roi_heads.on(student.strides))
        if config.transfer:
            assistant.head.load_state_dict(teacher.roi_heads.state_dict())
        return assistant

    def forward(self, batch: DistillationBatch, settings: RoISettings) -> Assistance:
        rois = settings.choose(batch)
        levels = tuple(adapter(level) for adapter, level in zip(self.adapters, batch.features.levels, strict=False))
        activations: RoIActivations = self.head(levels, rois)
        losses = self.head.loss(activations, rois, BOX_LOSS_BETA[self.config.box_loss])
        return Assistance(losses, tuple((layer,) for layer in activations.hidden), (rois,))

    def ask(self, teacher: Detector, features: Features, assistance: Assistance) -> tuple[Layer, ...]:
        """The teacher's RoI head on the RoIs of the assistant."""
        assert isinstance(teacher, RoIDetector)
        return tuple((layer,) for layer in teacher.roi_head(features, assistance.rois[0]).hidden)
