"""Cascade R-CNN (arXiv 1712.00726): a Faster R-CNN with several RoI heads, one after the other; the teacher of HEAD's
cascade assistant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from pydantic import Field
from torch import Tensor, nn

from pipeline.config import BaseConfig
from stages.detection.cascade import Cascade
from stages.detection.detectors.faster_rcnn import FasterRCNN
from stages.detection.proposals import SamplingSettings
from stages.detection.records import Features, RoIs, RoIStage, Targets
from stages.detection.roi_head import RoIHead


class CascadeStage(BaseConfig):
    """One stage of the cascade."""

    iou: float = Field(gt=0, lt=1)
    """Overlap with an object from which an RoI is positive."""
    box_weights: tuple[float, float, float, float]
    """Factors of the deltas of x, y, width and height: one over the deviation that they have in this stage."""
    weight: float = Field(default=1.0, ge=0)
    """Weight of the stage's losses."""


class CascadeRCNN(FasterRCNN):
    """With the default settings three stages with the overlaps, deviations and weights as published and in mmdet."""

    openmmlab: ClassVar[tuple[str, ...]] = ()

    class Config(FasterRCNN.Config):
        cascade: tuple[CascadeStage, ...] = Field(
            default=(
                CascadeStage(iou=0.5, box_weights=(10, 10, 5, 5), weight=1),
                CascadeStage(iou=0.6, box_weights=(20, 20, 10, 10), weight=0.5),
                CascadeStage(iou=0.7, box_weights=(30, 30, 15, 15), weight=0.25),
            ),
            min_length=1,
        )
        """The stages in their order, each with a head of the shape that `roi_head` says."""
        class_agnostic: bool = True
        """One box for all classes of an RoI, as published, or one for each class."""
        box_beta: float = Field(default=1.0, ge=0)
        """Error of a scaled delta up to which the box loss is quadratic: 1 in mmdet's cascade, 1/9 in Faster R-CNN."""

    def __init__(self, config: CascadeRCNN.Config, classes: int) -> None:
        super().__init__(config, classes)
        heads = [
            RoIHead(
                config.roi_head,
                config.neck_channels,
                self.strides,
                classes,
                box_weights=stage.box_weights,
                class_agnostic=config.class_agnostic,
            )
            for stage in config.cascade
        ]
        self.roi_heads = heads[0]
        self.later_heads = nn.ModuleList(heads[1:])
        self.cascade = Cascade(
            tuple(SamplingSettings(config.rois, iou=stage.iou) for stage in config.cascade),
            tuple(stage.weight for stage in config.cascade),
            config.box_beta,
        )

    @property
    def stages(self) -> tuple[RoIHead, ...]:
        return (self.roi_heads, *(head for head in self.later_heads if isinstance(head, RoIHead)))

    @property
    def sampling(self) -> SamplingSettings:
        return self.cascade.samplings[0]

    def look(
        self, features: Features, rois: RoIs, sizes: Sequence[tuple[int, int]], targets: Targets | None
    ) -> tuple[RoIStage, ...]:
        return self.cascade.run(self.stages, features.levels, rois, sizes, targets)

    def roi_loss(self, stages: Sequence[RoIStage]) -> dict[str, Tensor]:
        return self.cascade.loss(self.stages, stages)

    def decode(self, stages: Sequence[RoIStage]) -> tuple[Tensor, Tensor]:
        return self.cascade.decode(self.stages, stages)

    def convert(self, state: Mapping[str, Tensor], class_names: Sequence[str]) -> dict[str, Tensor]:
        raise ValueError("torchvision publishes no cascade; give a file that this pipeline trained")
