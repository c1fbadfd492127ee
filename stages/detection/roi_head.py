"""The second stage of a two-stage detector: RoIAlign over a pyramid, two hidden layers, class and box outputs, losses.

A teacher's head and HEAD's assistant are both this module, on features of different strides; module names are those of
torchvision's `roi_heads`, so its weights load.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead

from pipeline.config import BaseConfig
from stages.detection.precision import at_least_single
from stages.detection.records import RoIActivations, RoIs
from stages.detection.roi_align import align_rois

BOX_WEIGHTS = (10.0, 10.0, 5.0, 5.0)  # standard deviations .1 .1 .2 .2 of the deltas


class RoIHeadConfig(BaseConfig):
    """Shape of an RoI head."""

    hidden: int = 1024
    """Width of the two hidden layers."""
    resolution: int = 7
    """Cells a side of the pooled RoI."""
    sampling_ratio: int = 2
    """Samples a side of a cell; 0 adapts to the RoI's size, as mmdet (and HEAD) do; torchvision's models use 2."""
    aligned: bool = False
    """Shift by half a pixel, as mmdet (and HEAD) do; torchvision's published weights were trained without."""
    finest_scale: int = 56
    """RoIs up to twice this size (pixels) read the finest level, each doubling reads one coarser (arXiv 1612.03144, eq. 1)."""
    levels: int = 4
    """How many levels are read, from the finest."""


def roi_level(boxes_M4: Tensor, finest_scale: int, levels: int) -> Tensor:
    """Which of `levels` maps each RoI reads, 0 the finest. Depends on the box alone, not on strides, so that an
    assistant reads the level of the same index as its teacher: twice as coarse where its pyramid begins one later."""
    side = torch.sqrt((boxes_M4[:, 2] - boxes_M4[:, 0]) * (boxes_M4[:, 3] - boxes_M4[:, 1]))
    return torch.floor(torch.log2(side / finest_scale + 1e-6)).clamp(0, levels - 1).long()


class RoIHead(nn.Module):
    """`channels` and `strides` are those of the levels that are read; `classes` without background; `box_weights` factors of
    the deltas of x, y, width and height; `class_agnostic` one box a RoI instead of one for each class."""

    def __init__(
        self,
        config: RoIHeadConfig,
        channels: int,
        strides: tuple[int, ...],
        classes: int,
        *,
        box_weights: tuple[float, float, float, float] = BOX_WEIGHTS,
        class_agnostic: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.channels = channels
        self.strides = strides[: config.levels]
        self.classes = classes
        self.box_head = TwoMLPHead(channels * config.resolution**2, config.hidden)
        self.class_agnostic = class_agnostic
        self.box_predictor = FastRCNNPredictor(config.hidden, classes + 1)
        if class_agnostic:
            self.box_predictor.bbox_pred = nn.Linear(config.hidden, 4)
        self.box_weights = box_weights
        self.coder = BoxCoder(box_weights)

    def on(self, strides: tuple[int, ...]) -> RoIHead:
        """A new head of this shape, with random weights, for levels of other strides: an assistant's."""
        return RoIHead(
            self.config,
            self.channels,
            strides,
            self.classes,
            box_weights=self.box_weights,
            class_agnostic=self.class_agnostic,
        )

    def pool(self, levels: tuple[Tensor, ...], rois: RoIs) -> Tensor:
        """(M, C, resolution, resolution) by RoIAlign, each RoI from its level."""
        config, used = self.config, levels[: len(self.strides)]
        level_M = roi_level(rois.boxes_M4, config.finest_scale, len(used))
        side = config.resolution
        pooled = used[0].new_zeros((len(level_M), used[0].shape[1], side, side))
        for number, (level, stride) in enumerate(zip(used, self.strides, strict=True)):
            rows = torch.where(level_M == number)[0]
            if len(rows):
                image, boxes = rois.image_M[rows], rois.boxes_M4[rows]
                found = align_rois(level, image, boxes, side, stride, config.sampling_ratio, config.aligned)
                pooled = pooled.index_copy(0, rows, found.to(pooled.dtype))
        return pooled

    def forward(self, levels: tuple[Tensor, ...], rois: RoIs) -> RoIActivations:
        """Hidden layers are taken after an explicit ReLU: the tensors that HEAD's AKD and CKD compare."""
        first = functional.relu(self.box_head.fc6(self.pool(levels, rois).flatten(1)))
        second = functional.relu(self.box_head.fc7(first))
        logits, deltas = self.box_predictor(second)
        return RoIActivations((first, second), logits, deltas.view(-1, deltas.shape[1] // 4, 4))

    def loss(self, activations: RoIActivations, rois: RoIs, beta: float = 1 / 9) -> dict[str, Tensor]:
        """Cross entropy over 1 + K classes and smooth L1 on the deltas of the true class (torchvision's `fastrcnn_loss`);
        up to `beta` the box loss is quadratic, at 0 it is L1."""
        target = rois.labels_M + 1
        classification = functional.cross_entropy(at_least_single(activations.logits), target, reduction="sum")
        positive = torch.where(target > 0)[0]
        wanted = self.coder.encode_single(rois.matched_M4[positive], rois.boxes_M4[positive])
        column = torch.zeros_like(positive) if self.class_agnostic else target[positive]
        given = at_least_single(activations.deltas[positive, column])
        box = functional.smooth_l1_loss(given, wanted, beta=beta, reduction="sum")
        count = max(1, len(target))
        return {"cls": classification / count, "box": box / count}

    def decode(self, activations: RoIActivations, rois: RoIs) -> tuple[Tensor, Tensor]:
        """Boxes per class (M, K, 4) in pixels, and probabilities (M, K), background left out."""
        scores = at_least_single(activations.logits).softmax(1)[:, 1:]
        deltas = at_least_single(activations.deltas)
        boxes = self.coder.decode_single(deltas.flatten(1), rois.boxes_M4).view_as(deltas)
        return boxes.expand(-1, self.classes, -1) if self.class_agnostic else boxes[:, 1:], scores
