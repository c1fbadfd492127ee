"""FCOS's rules: what each point predicts, which object it learns, and by which losses (arXiv 1904.01355, 2006.09214).

A point is an anchor here, one a cell, a square of the stride's side around it. The detector and HEAD's assistant of its
kind both work by these rules, each with a head of its own. Equal to torchvision's `fcos_resnet50_fpn`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.models.detection._utils import BoxLinearCoder
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

from stages.detection.anchors import AnchorGrid
from stages.detection.dense_head import DenseHead, DistanceHead
from stages.detection.precision import at_least_single
from stages.detection.records import Anchors, DensePredictions, Targets

CODER = BoxLinearCoder(normalize_by_size=True)


def point_grid(strides: tuple[int, ...], points: Literal["corner", "centre"] = "corner") -> AnchorGrid:
    """One point a cell of each level: on its corner, as torchvision does, or in its middle, as published."""
    if points == "centre":
        return AnchorGrid(strides, 1.0, 1, (1.0,), "exact", offset=0.5)
    return AnchorGrid(strides, 1.0, 1, (1.0,))


def predict_points(head: DenseHead, levels: tuple[Tensor, ...], anchors: Anchors) -> DensePredictions:
    """What a head with distances says of the points of the level maps."""
    regression = head.regression_head
    assert isinstance(regression, DistanceHead)
    class_tower, logits = head.classification_head(levels)
    box_tower, distances = regression(levels)
    quality = regression.centerness(class_tower, box_tower)
    boxes = CODER.decode(at_least_single(distances), anchors.boxes_A4)
    return DensePredictions(class_tower, box_tower, logits, distances, boxes, anchors, quality)


def centerness(points_P4: Tensor, truth_P4: Tensor) -> Tensor:
    """1 in the middle of the object, 0 on its edge (arXiv 1904.01355, eq. 3)."""
    sides_P22 = CODER.encode(points_P4, truth_P4).view(-1, 2, 2)
    centred: Tensor = (sides_P22.amin(1) / sides_P22.amax(1)).prod(1).sqrt()
    return centred


@dataclass(frozen=True)
class PointRules:
    """A point learns an object within `centre_radius` strides of whose centre it lies, and whose farthest side is within
    `reach` strides but not within half of it; the first and the last level serve all that is smaller and larger."""

    centre_radius: float = 1.5
    reach: float = 8.0

    def loss(self, predictions: DensePredictions, targets: Targets) -> dict[str, Tensor]:
        """Focal loss, GIoU loss, and cross entropy of the centerness, each a sum over the batch divided by its positives
        (torchvision)."""
        anchors = predictions.anchors
        match_BA = torch.stack([self.match(truth, anchors) for truth in targets.boxes])
        image, point = torch.where(match_BA >= 0)
        owners = [match[match >= 0] for match in match_BA]
        truth = torch.cat([boxes[owner] for boxes, owner in zip(targets.boxes, owners, strict=True)])
        labels = torch.cat([names[owner] for names, owner in zip(targets.labels, owners, strict=True)])
        logits = at_least_single(predictions.logits_BAK)
        wanted = torch.zeros_like(logits)
        wanted[image, point, labels] = 1
        classification = sigmoid_focal_loss(logits, wanted, reduction="sum")
        box = generalized_box_iou_loss(predictions.boxes_BA4[image, point], truth, reduction="sum")
        assert predictions.quality_BA is not None
        given = at_least_single(predictions.quality_BA)[image, point]
        centred = centerness(anchors.boxes_A4[point], truth).to(given.dtype)
        quality = functional.binary_cross_entropy_with_logits(given, centred, reduction="sum")
        count = max(1, len(point))
        return {"cls": classification / count, "box": box / count, "centerness": quality / count}

    def match(self, truth_N4: Tensor, anchors: Anchors) -> Tensor:
        """Index (A,) of the object each point stands for, the smallest of those that it may, or -1 for background."""
        boxes_A4 = anchors.boxes_A4
        if len(truth_N4) == 0:
            return torch.full((len(boxes_A4),), -1, dtype=torch.int64, device=boxes_A4.device)
        side_A1 = boxes_A4[:, 2:3] - boxes_A4[:, 0:1]
        point_A12 = (boxes_A4[:, None, :2] + boxes_A4[:, None, 2:]) / 2
        centre_N2 = (truth_N4[:, :2] + truth_N4[:, 2:]) / 2
        near = (point_A12 - centre_N2).abs().amax(2) < self.centre_radius * side_A1
        sides_AN4 = torch.cat([point_A12 - truth_N4[:, :2], truth_N4[:, 2:] - point_A12], 2)
        farthest = sides_AN4.amax(2)
        upper = self.reach * side_A1
        lower = upper / 2
        lower[: anchors.per_level[0]] = 0
        upper[-anchors.per_level[-1] :] = torch.inf
        fits = near & (sides_AN4.amin(2) > 0) & (farthest > lower) & (farthest < upper)
        area_N = (truth_N4[:, 2] - truth_N4[:, 0]) * (truth_N4[:, 3] - truth_N4[:, 1])
        best = torch.where(fits, area_N, torch.inf).min(1)
        return torch.where(best.values.isinf(), -1, best.indices)
