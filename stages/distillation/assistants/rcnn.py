"""The R-CNN assistant: a Faster R-CNN's second stage on the student's pyramid (HEAD's published assistant)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pipeline.config import BaseConfig
from pipeline.errors import UserError
from stages.detection.detector import Detector, Features, RoIActivations, RoIDetector, RoIs
from stages.distillation.assistant import Assistant


class RCNN(Assistant):
    """The teacher's RoI head, reading the student's level of the same index (twice as coarse where the student begins at P3)."""

    class Config(BaseConfig):
        transfer: bool = True
        """Begin with the teacher's weights; without, the assistant starts from random ones."""

    def __init__(self, student_channels: tuple[int, ...], strides: tuple[int, ...], teacher: RoIDetector) -> None:
        super().__init__()
        shape = teacher.roi_heads
        self.head = shape.on(strides)
        self.hidden = (shape.config.hidden,) * 2
        # Ours: the published pairs share 256 channels; a 1x1 convolution bridges others.
        used = student_channels[: len(self.head.strides)]
        self.adapters = nn.ModuleList(
            nn.Identity() if channels == shape.channels else nn.Conv2d(channels, shape.channels, 1) for channels in used
        )

    @classmethod
    def build(cls, config: Any, student: Detector, teacher: Detector | None) -> RCNN:
        if not isinstance(teacher, RoIDetector):
            given = "none" if teacher is None else type(teacher).__name__
            raise UserError(f"assistant rcnn: needs a two-stage teacher, was given {given}; take a faster_rcnn teacher")
        assistant = cls(student.channels, student.strides, teacher)
        if config.transfer:
            assistant.head.load_state_dict(teacher.roi_heads.state_dict())
        return assistant

    def forward(self, features: Features, rois: RoIs) -> RoIActivations:
        levels = tuple(adapter(level) for adapter, level in zip(self.adapters, features.levels, strict=False))
        activations: RoIActivations = self.head(levels, rois)
        return activations

    def loss(self, activations: RoIActivations, rois: RoIs) -> dict[str, Tensor]:
        return self.head.loss(activations, rois)
