"""FCOS (arXiv 1904.01355, with the centerness of 2006.09214) from torchvision's blocks: a student without anchors.

A point is an anchor here, one a cell, a square of the stride's side around it: whoever reads dense predictions finds
FCOS's in the same order, with one anchor a cell. As in torchvision, points lie on the corners of cells.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from stages.detection.candidates import best_candidates
from stages.detection.dense_head import DenseConfig, DenseHead, Distances, TowerNorm, dense_head
from stages.detection.detector import DenseDetector
from stages.detection.points import PointRules, point_grid, predict_points
from stages.detection.precision import at_least_single
from stages.detection.pyramid import carry_eps, pyramid, run_pyramid
from stages.detection.records import Candidates, DensePredictions, Features, Targets
from stages.detection.torchvision_weights import class_rows, select_rows


class FCOS(DenseDetector):
    """With the default settings and equal weights it equals torchvision's `fcos_resnet50_fpn`."""

    openmmlab: ClassVar[tuple[str, ...]] = ("FCOS",)

    class Config(DenseConfig):
        head_norm: TowerNorm = "group"
        """Group normalisation in the towers, as published, or none."""
        centre_radius: float = Field(default=1.5, gt=0)
        """Points learn an object when they are this near to its centre, in strides, and inside it."""
        reach: float = Field(default=8.0, gt=0)
        """Distance from a point to the farthest side of its object up to which a level serves it, in strides; what is
        within half of it belongs to the level below, and the last level serves all that is larger."""
        points: Literal["corner", "centre"] = "corner"
        """Where the point of a cell lies: torchvision's on the corner, the published one's and OpenMMLab's in the middle."""
        distance: Literal["relu", "exp"] = "relu"
        """Distances in strides behind a ReLU, or in pixels by exp, as in OpenMMLab's without `norm_on_bbox`."""
        level_scales: bool = False
        """A learnt factor of the distances for each level, as in OpenMMLab's."""
        centerness_tower: Literal["box", "class"] = "box"
        """The tower on which the centerness stands; OpenMMLab's without `centerness_on_reg` have it on that of the classes."""

    head: DenseHead
    tower_channels: int

    def __init__(self, config: FCOS.Config, classes: int) -> None:
        super().__init__(config.pixel_mean, config.pixel_std)
        self.config = config
        self.classes = classes
        self.backbone, self.strides = pyramid(config, 3, config.extra_levels, extra_from="P5")
        self.channels = (config.neck_channels,) * len(self.strides)
        self.anchors = point_grid(self.strides, config.points)
        self.per_cell = self.anchors.per_cell
        self.tower_channels = config.tower_channels
        scales = len(self.strides) if config.level_scales else 0
        how = Distances(config.distance, self.strides, scales, config.centerness_tower)
        self.head = dense_head(config, len(self.strides), self.per_cell, classes, how)
        self.rules = PointRules(config.centre_radius, config.reach)

    @classmethod
    def build(cls, config: FCOS.Config, classes: int) -> FCOS:
        return cls(config, classes)

    def features(self, images_BCHW: Tensor) -> Features:
        return run_pyramid(self.backbone, self.normalise(images_BCHW))

    def predict(self, features: Features, targets: Targets | None = None) -> DensePredictions:
        return predict_points(self.head, features.levels, self.anchors(features.levels, features.size))

    def loss(self, predictions: DensePredictions, targets: Targets) -> dict[str, Tensor]:
        """Named `cls`, `box` and `centerness`: see `PointRules`."""
        return self.rules.loss(predictions, targets)

    def candidates(self, predictions: DensePredictions, count: int) -> Candidates:
        """Top `count` of all (point, class) pairs by the geometric mean of class probability and centerness; its root
        comes after the cut, which changes nothing."""
        assert predictions.quality_BA is not None
        quality = at_least_single(predictions.quality_BA).sigmoid()
        scores = at_least_single(predictions.logits_BAK).sigmoid() * quality[..., None]
        best = best_candidates(scores, predictions.boxes_BA4, count)
        return replace(best, scores_BN=best.scores_BN.sqrt())

    def convert(self, state: Mapping[str, Tensor], class_names: Sequence[str]) -> dict[str, Tensor]:
        """Its towers are flat (convolution, normalisation, ReLU, convolution ...), ours one block a convolution. Of its
        detectors this one alone was published with an eps in the frozen normalisations."""

        def name(key: str) -> str:
            flat = re.fullmatch(r"(head\.\w+\.conv)\.(\d+)\.(weight|bias)", key)
            return f"{flat[1]}.{int(flat[2]) // 3}.{int(flat[2]) % 3}.{flat[3]}" if flat else key

        result = {name(key): value for key, value in state.items()}
        for part in ("weight", "bias"):
            key = f"head.classification_head.cls_logits.{part}"
            outputs = result[key].shape[0]
            rows = class_rows(outputs, class_names, background=False)
            result[key] = select_rows(result[key], rows, 1, outputs, 1)
        return carry_eps(result, self.backbone.body, "backbone.body.")
