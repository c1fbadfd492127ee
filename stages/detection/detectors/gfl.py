"""GFL (arXiv 2006.04388): without anchors, scores that are the quality of their boxes, sides that are distributions.

A point is an anchor here, as for FCOS; which point learns which object ATSS says. With the default settings it is the
published detector but for its scale for each level, which distances in strides do not need. With a backbone for phones,
`neck: pan`, a depthwise head and batch normalisation it is a detector of the nano class (docs/methods.md, Students).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torchvision.ops import generalized_box_iou_loss

from stages.detection.assignment import Assignment, atss, squares
from stages.detection.dense_head import DenseConfig, DenseHead, TowerNorm, dense_head
from stages.detection.detector import DenseDetector
from stages.detection.generalised_focal import bins_of, distribution_focal, expected, quality_focal
from stages.detection.overlap import paired_iou
from stages.detection.pan import PathAggregation
from stages.detection.points import CODER, point_grid
from stages.detection.precision import at_least_single
from stages.detection.pyramid import pyramid, run_pyramid
from stages.detection.records import (
    Anchors,
    DensePredictions,
    Features,
    Targets,
)


class GFL(DenseDetector):
    """A dense detector with a distribution for each side of each box."""

    class Config(DenseConfig):
        head_norm: TowerNorm = "group"
        """Group normalisation in the towers, as published; batch normalisation, folded away by the export, with towers of
        its own for each level; or none."""
        neck: Literal["fpn", "pan"] = "fpn"
        """Feature pyramid, as published; or path aggregation of depthwise blocks: light, and with a second way from fine to
        coarse. `extra_levels` are then blocks of it."""
        bins: int = Field(default=17, ge=2)
        """Distances of 0, 1, ... bins - 1 strides that a side is a distribution over; 17 as published, 8 for small heads. A
        box reaches as far from its point."""
        anchor_scale: float = Field(default=8.0, gt=0)
        """Side of the squares by whose overlap points are assigned to objects, in strides."""
        nearest: int = Field(default=9, ge=1)
        """Points of each level that may learn an object, the nearest to its centre."""
        box: float = Field(default=2.0, ge=0)
        """Weight of the boxes' GIoU loss."""
        dfl: float = Field(default=0.25, ge=0)
        """Weight of the distributions' loss."""

    head: DenseHead
    tower_channels: int

    def __init__(self, config: GFL.Config, classes: int) -> None:
        super().__init__(config.pixel_mean, config.pixel_std)
        self.config = config
        self.classes = classes
        if config.neck == "fpn":
            self.backbone, self.strides = pyramid(config, 3, config.extra_levels, extra_from="P5")
        else:
            self.backbone, strides = pyramid(config, 3, 0)
            inside = self.backbone.body.channels[1:]
            self.backbone.fpn = PathAggregation(inside, config.neck_channels, config.extra_levels)
            self.strides = (*strides, *(strides[-1] * 2 ** (n + 1) for n in range(config.extra_levels)))
        self.channels = (config.neck_channels,) * len(self.strides)
        self.anchors = point_grid(self.strides)
        self.per_cell = self.anchors.per_cell
        self.tower_channels = config.tower_channels
        self.bins = config.bins
        self.head = dense_head(config, len(self.strides), self.per_cell, classes, bins=config.bins)
        self.register_buffer("bins_N", bins_of(config.bins), persistent=False)

    @classmethod
    def build(cls, config: GFL.Config, classes: int) -> GFL:
        return cls(config, classes)

    def features(self, images_BCHW: Tensor) -> Features:
        return run_pyramid(self.backbone, self.normalise(images_BCHW))

    def predict(self, features: Features, targets: Targets | None = None) -> DensePredictions:
        anchors = self.anchors(features.levels, features.size)
        class_tower, logits = self.head.classification_head(features.levels)
        box_tower, sides = self.head.regression_head(features.levels)
        distances = expected(at_least_single(sides), self.get_buffer("bins_N"))
        boxes = CODER.decode(distances, anchors.boxes_A4)
        return DensePredictions(class_tower, box_tower, logits, distances, boxes, anchors, sides_BA4N=sides)

    def loss(self, predictions: DensePredictions, targets: Targets) -> dict[str, Tensor]:
        """Named `cls` (quality focal loss over the batch's positives), `box` (GIoU) and `dfl`, both weighted by the class
        probability of each positive and divided by the sum of these weights, at least 1."""
        anchors, sides = predictions.anchors, predictions.sides_BA4N
        assert sides is not None
        matches = [self.assign(truth, anchors).match_A for truth in targets.boxes]
        image, point = torch.where(torch.stack(matches) >= 0)
        owners = [match[match >= 0] for match in matches]
        truth = torch.cat([boxes[owner] for boxes, owner in zip(targets.boxes, owners, strict=True)])
        labels = torch.cat([names[owner] for names, owner in zip(targets.labels, owners, strict=True)])
        logits = at_least_single(predictions.logits_BAK)
        boxes = predictions.boxes_BA4[image, point]
        wanted = torch.zeros_like(logits)
        wanted[image, point, labels] = paired_iou(boxes.detach(), truth).to(wanted.dtype)
        classification = quality_focal(logits, wanted).sum() / max(1, len(point))
        weight = logits.detach()[image, point].sigmoid().amax(-1)
        whole = weight.sum().clamp(min=1)
        distances = CODER.encode(anchors.boxes_A4[point], truth).to(logits.dtype)
        focal = distribution_focal(at_least_single(sides)[image, point], distances).mean(1)
        return {
            "cls": classification,
            "box": self.config.box * (generalized_box_iou_loss(boxes, truth) * weight).sum() / whole,
            "dfl": self.config.dfl * (focal * weight).sum() / whole,
        }

    def assign(self, truth_N4: Tensor, anchors: Anchors) -> Assignment:
        """Which point stands for which object of one image."""
        around = squares(anchors, self.config.anchor_scale)
        return atss(truth_N4, around, anchors.per_level, self.config.nearest)

    def convert(self, state: Mapping[str, Tensor], class_names: Sequence[str]) -> dict[str, Tensor]:
        """torchvision has no such detector. Raises ValueError."""
        raise ValueError("torchvision publishes no weights of a gfl; give a file of ours (.safetensors)")
