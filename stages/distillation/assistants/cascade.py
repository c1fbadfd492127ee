"""The cascade assistant: a Cascade R-CNN's RoI heads on the student's pyramid (HEAD's for a Faster R-CNN student;
LutingWang/HEAD, branch dev, configs/kd/tb_head_cas_mnv2.py)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from pipeline.config import BaseConfig
from pipeline.errors import UserError
from stages.detection.detector import Detector, RoIDetector
from stages.detection.detectors.cascade_rcnn import CascadeRCNN
from stages.detection.records import Features
from stages.detection.roi_head import RoIHead
from stages.distillation.assistant import Assistance, RoIAssistant, RoISettings, level_adapters
from stages.distillation.imitation import Layer
from stages.distillation.method import DistillationBatch


class CascadeAssistant(RoIAssistant):
    """RoI heads one after the other, each looking at the boxes that the one before it refined; all hidden layers count."""

    class Config(BaseConfig):
        transfer: bool = True
        """Begin with the teacher's weights; without, the assistant starts from random ones."""

    def __init__(self, student: Detector, teacher: CascadeRCNN) -> None:
        super().__init__()
        self.cascade = teacher.cascade
        self.heads = nn.ModuleList(head.on(student.strides) for head in teacher.stages)
        self.widths = tuple(head.config.hidden for head in teacher.stages for _ in range(2))
        first = teacher.roi_heads
        self.adapters = level_adapters(student.channels[: first.config.levels], first.channels)

    @classmethod
    def build(cls, config: Any, student: Detector, teacher: Detector | None) -> CascadeAssistant:
        if not isinstance(teacher, CascadeRCNN):
            given = "none" if teacher is None else type(teacher).__name__
            raise UserError(
                f"assistant cascade: needs a cascade_rcnn teacher, was given {given}; take the assistant rcnn"
            )
        assistant = cls(student, teacher)
        if config.transfer:
            for mine, theirs in zip(assistant.heads, teacher.stages, strict=True):
                mine.load_state_dict(theirs.state_dict())
        return assistant

    def forward(self, batch: DistillationBatch, settings: RoISettings) -> Assistance:
        """Later stages sample as many RoIs as the first, by the teacher's overlaps."""
        levels = tuple(adapter(level) for adapter, level in zip(self.adapters, batch.features.levels, strict=False))
        heads = [head for head in self.heads if isinstance(head, RoIHead)]
        samplings = tuple(replace(sampling, count=settings.rois) for sampling in self.cascade.samplings)
        cascade = replace(self.cascade, samplings=samplings)
        stages = cascade.run(heads, levels, settings.choose(batch), batch.targets.sizes, batch.targets)
        hidden = tuple((layer,) for stage in stages for layer in stage.activations.hidden)
        return Assistance(cascade.loss(heads, stages), hidden, tuple(stage.rois for stage in stages))

    def ask(self, teacher: Detector, features: Features, assistance: Assistance) -> tuple[Layer, ...]:
        """Each stage of the teacher on the RoIs of the assistant's stage."""
        assert isinstance(teacher, RoIDetector)
        asked = [teacher.roi_head(features, rois, number) for number, rois in enumerate(assistance.rois)]
        return tuple((layer,) for activations in asked for layer in activations.hidden)
