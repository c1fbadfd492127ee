"""The typed records that travel between the steps of a detector, and between detectors, methods and assistants.

Shape letters: B images, C channels, H rows, W columns, A anchors of all levels, K classes, M RoIs of all images, N candidates
of an image. Boxes are xyxy in pixels of the input canvas. Labels are 0-based.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Targets(NamedTuple):  # no dataclass: Fabric walks through what a module is given and refuses frozen ones
    """Ground truth of a batch: `boxes[b]` (n, 4) xyxy, `labels[b]` (n,) int64, `sizes[b]` the (height, width) of the real
    image inside the canvas, to which proposals are clipped."""

    boxes: Sequence[Tensor]
    labels: Sequence[Tensor]
    sizes: Sequence[tuple[int, int]]

    def to(self, device: torch.device) -> Targets:
        """The same on another device."""
        return Targets([b.to(device) for b in self.boxes], [label.to(device) for label in self.labels], self.sizes)


@dataclass(frozen=True)
class Features:
    """`backbone`: BCHW per backbone stage; `levels`: BCHW per neck level, finest first; `size`: (height, width) of the input."""

    backbone: tuple[Tensor, ...]
    levels: tuple[Tensor, ...]
    size: tuple[int, int]


@dataclass(frozen=True)
class Anchors:
    """All anchors of one canvas in the one order used everywhere: level, row, column, anchor (the last fastest)."""

    boxes_A4: Tensor
    shapes: tuple[tuple[int, int], ...]  # (rows, columns) per level
    per_cell: int

    @property
    def per_level(self) -> list[int]:
        return [rows * columns * self.per_cell for rows, columns in self.shapes]


@dataclass(frozen=True)
class DensePredictions:
    """What a dense head says of every anchor; `class_tower` and `box_tower` are BCHW after the last ReLU, per level.

    `quality_BA` is the logit of how well an anchor is placed (FCOS's centerness), None where the head has no such output:
    scores of candidates are discounted by it, proposals are not (as HEAD does). `sides_BA4N` are the logits of a
    distribution over N distances for each side (GFL: left, top, right, bottom; 0 to N - 1 anchor sides), None where sides are
    regressed directly. The sigmoid of `logits_BAK` is a class's probability, also where classes compete in a softmax (SSD): there
    `background_BA` is the background's, and both are log-odds.
    """

    class_tower: tuple[Tensor, ...]
    box_tower: tuple[Tensor, ...]
    logits_BAK: Tensor
    deltas_BA4: Tensor
    boxes_BA4: Tensor
    anchors: Anchors
    quality_BA: Tensor | None = None
    sides_BA4N: Tensor | None = None
    background_BA: Tensor | None = None


@dataclass(frozen=True)
class Proposals:
    """Boxes of one image worth a look. `source` is the flat anchor index each came from, -1 where there is none."""

    boxes: Tensor
    scores: Tensor
    source: Tensor


@dataclass(frozen=True)
class RoIs:
    """Regions of a batch, image after image. `labels` is the 0-based class or -1 for background; `source` as in Proposals
    (ground-truth boxes among the RoIs have -1)."""

    boxes_M4: Tensor
    image_M: Tensor
    source_M: Tensor
    labels_M: Tensor
    matched_M4: Tensor


@dataclass(frozen=True)
class RoIActivations:
    """What an RoI head computes of each RoI: `hidden` layers after their ReLU (M, D), `logits` with background first
    (M, 1 + K), `deltas` per class (M, 1 + K, 4), or (M, 1, 4) where the head's boxes are the same for all classes."""

    hidden: tuple[Tensor, ...]
    logits: Tensor
    deltas: Tensor


@dataclass(frozen=True)
class RoIStage:
    """One run of an RoI head: where it looked and what it computed."""

    rois: RoIs
    activations: RoIActivations


@dataclass(frozen=True)
class RoIPredictions:
    """A two-stage detector's predictions: the dense first stage, and the second stage on `rois`. A cascade has several
    runs of RoI heads: `rois` and `activations` are those of the last, `earlier` the others."""

    objectness_BA: Tensor
    deltas_BA4: Tensor
    anchors: Anchors
    proposals: tuple[Proposals, ...]
    rois: RoIs
    activations: RoIActivations
    earlier: tuple[RoIStage, ...] = ()

    @property
    def stages(self) -> tuple[RoIStage, ...]:
        """All runs of RoI heads in their order."""
        return (*self.earlier, RoIStage(self.rois, self.activations))


Predictions = DensePredictions | RoIPredictions


@dataclass(frozen=True)
class Candidates:
    """The N best boxes of each image before NMS, best first: what the exported graph returns (without `source`)."""

    boxes_BN4: Tensor
    scores_BN: Tensor
    labels_BN: Tensor
    source_BN: Tensor


@dataclass(frozen=True)
class ProposalSettings:
    """How many proposals survive: per level before NMS, NMS inside each level, per image after it (arXiv 2207.05345, code)."""

    before_nms: int = 2000
    nms_iou: float = 0.7
    after_nms: int = 1000
