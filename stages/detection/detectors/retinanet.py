"""RetinaNet (arXiv 1708.02002) from torchvision's blocks: the usual student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.ops import box_iou, sigmoid_focal_loss

from stages.detection.anchors import AnchorGrid, AnchorKind
from stages.detection.dense_head import DenseConfig, DenseHead, dense_head
from stages.detection.detector import DenseDetector
from stages.detection.precision import at_least_single
from stages.detection.pyramid import pyramid, run_pyramid
from stages.detection.records import DensePredictions, Features, Targets
from stages.detection.torchvision_weights import class_rows, modern_names, select_rows


class RetinaNet(DenseDetector):
    """With the default settings and equal weights it equals torchvision's `retinanet_resnet50_fpn`."""

    openmmlab: ClassVar[tuple[str, ...]] = ("RetinaNet",)

    class Config(DenseConfig):
        anchor_scale: float = Field(default=4.0, gt=0)
        """Side of the smallest anchor of a level, in strides."""
        anchor_octaves: int = Field(default=3, ge=1)
        """Anchor sizes a cell, 2^(1/octaves) apart."""
        aspect_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
        """Height over width of the anchors."""
        anchor_grid: AnchorKind = "whole"
        """Anchors in whole pixels, as torchvision's, or exact, as OpenMMLab's."""
        extra_relu: bool = True
        """A ReLU between P6 and P7, as torchvision has it; OpenMMLab's RetinaNet has none."""

    students = tuple(
        {
            "backbone": backbone,
            "backbone_norm": "batch",
            "trainable_layers": 5,
            "neck_channels": neck,
            "head_convs": convs,
            "head_kind": kind,
            "head_norm": "group",
            "anchor_scale": 2,
        }
        for backbone, neck, convs, kind in (
            ("tiny", 24, 1, "depthwise"),  # no width whose groups are one channel: a map of one cell has no variance
            ("tiny", 40, 1, "depthwise"),
            ("tiny", 48, 2, "depthwise"),
            ("tiny", 48, 2, "plain"),
            ("mobilenet_v2", 48, 2, "depthwise"),
            ("mobilenet_v2", 64, 3, "depthwise"),
            ("mobilenet_v2", 96, 4, "depthwise"),
            ("resnet18", 64, 2, "depthwise"),
            ("resnet18", 96, 4, "depthwise"),
            ("resnet18", 128, 4, "depthwise"),
            ("resnet18", 128, 2, "plain"),
            ("resnet18", 256, 4, "plain"),
            ("resnet50", 128, 4, "depthwise"),
            ("resnet50", 256, 4, "plain"),
        )
    )

    head: DenseHead
    tower_channels: int

    def __init__(self, config: RetinaNet.Config, classes: int) -> None:
        super().__init__(config.pixel_mean, config.pixel_std)
        self.config = config
        self.classes = classes
        self.backbone, self.strides = pyramid(config, 3, config.extra_levels, extra_relu=config.extra_relu)
        self.channels = (config.neck_channels,) * len(self.strides)
        self.anchors = AnchorGrid(
            self.strides, config.anchor_scale, config.anchor_octaves, config.aspect_ratios, config.anchor_grid
        )
        self.per_cell = self.anchors.per_cell
        self.tower_channels = config.tower_channels
        self.head = dense_head(config, len(self.strides), self.per_cell, classes)
        self.coder = BoxCoder((1.0, 1.0, 1.0, 1.0))
        self.matcher = Matcher(0.5, 0.4, allow_low_quality_matches=True)

    @classmethod
    def build(cls, config: RetinaNet.Config, classes: int) -> RetinaNet:
        return cls(config, classes)

    def features(self, images_BCHW: Tensor) -> Features:
        return run_pyramid(self.backbone, self.normalise(images_BCHW))

    def predict(self, features: Features, targets: Targets | None = None) -> DensePredictions:
        anchors = self.anchors(features.levels, features.size)
        class_tower, logits = self.head.classification_head(features.levels)
        box_tower, deltas = self.head.regression_head(features.levels)
        repeated = anchors.boxes_A4.repeat(deltas.shape[0], 1)  # len() would fix the batch of an export
        boxes = self.coder.decode_single(at_least_single(deltas).flatten(0, 1), repeated).view_as(deltas)
        return DensePredictions(class_tower, box_tower, logits, deltas, boxes, anchors)

    def loss(self, predictions: DensePredictions, targets: Targets) -> dict[str, Tensor]:
        """Focal loss and L1 on the deltas, each divided by an image's positives and averaged over images (torchvision)."""
        wanted, weights, pairs, boxes = [], [], [], []
        anchors = predictions.anchors.boxes_A4
        for number, (truth, labels) in enumerate(zip(targets.boxes, targets.labels, strict=True)):
            match = self._match(truth, anchors)
            positive = torch.where(match >= 0)[0]
            share = 1 / max(1, len(positive))
            target = torch.zeros_like(predictions.logits_BAK[0])
            target[positive, labels[match[positive]]] = 1
            wanted.append(target)
            weights.append((match != Matcher.BETWEEN_THRESHOLDS).to(target.dtype) * share)
            pairs.append((number, positive, share))
            boxes.append(truth[match[positive]])
        logits = at_least_single(predictions.logits_BAK)
        focal = sigmoid_focal_loss(logits, torch.stack(wanted).to(logits.dtype), reduction="none")
        images = len(targets.boxes)
        classification = (focal.sum(-1) * torch.stack(weights)).sum() / images
        box = predictions.deltas_BA4.sum() * 0.0  # a batch without objects still has a gradient
        for (number, positive, share), truth in zip(pairs, boxes, strict=True):
            encoded = self.coder.encode_single(truth, anchors[positive])
            box = box + functional.l1_loss(predictions.deltas_BA4[number, positive], encoded, reduction="sum") * share
        return {"cls": classification, "box": box / images}

    def _match(self, truth_N4: Tensor, anchors_A4: Tensor) -> Tensor:
        """Index of the object each anchor stands for, or -1 (background), -2 (neither)."""
        if len(truth_N4) == 0:
            return torch.full((len(anchors_A4),), -1, dtype=torch.int64, device=anchors_A4.device)
        match: Tensor = self.matcher(box_iou(truth_N4, anchors_A4))
        return match

    def convert(self, state: Mapping[str, Tensor], class_names: Sequence[str]) -> dict[str, Tensor]:
        result, per_cell = modern_names(state), self.anchors.per_cell
        for part in ("weight", "bias"):
            key = f"head.classification_head.cls_logits.{part}"
            outputs = result[key].shape[0] // per_cell
            rows = class_rows(outputs, class_names, background=False)
            result[key] = select_rows(result[key], rows, per_cell, outputs, 1)
        return result
