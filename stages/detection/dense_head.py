"""The head of RetinaNet and FCOS: a class tower and a box tower shared by all levels, and their output convolutions.

Module names are those of torchvision/models/detection/retinanet.py, so its weights load. Towers are returned after
their last ReLU, applied out of place: HEAD's CKD reads exactly these maps (methods: arXiv 2207.05345).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops.misc import Conv2dNormActivation

from stages.detection.pyramid import PyramidConfig

TowerKind = Literal["plain", "depthwise"]
TowerNorm = Literal["none", "group"]


class DenseConfig(PyramidConfig):
    """What every detector with one dense head on all levels sets."""

    extra_levels: Literal[0, 1, 2] = 2
    """Levels above P5: 1 subsamples P5, 2 are convolutions (P6 and P7)."""
    head_convs: int = Field(default=4, ge=0, le=8)
    """Convolutions of each of the two towers."""
    head_channels: int | None = Field(default=None, ge=8)
    """Width of the towers; as wide as the neck where none is given."""
    head_kind: TowerKind = "plain"
    """Plain 3x3 convolutions, or depthwise 3x3 followed by 1x1: about eight times fewer operations."""
    head_norm: TowerNorm = "none"
    """Group normalisation in the towers (needed when training from random weights), or none."""

    @property
    def tower_channels(self) -> int:
        """Width of the towers' maps, those of the neck where a tower has no convolution."""
        return (self.head_channels if self.head_convs else None) or self.neck_channels


def _tower(
    channels: int, width: int, depth: int, kind: TowerKind, norm: TowerNorm, bias: bool | None = None
) -> nn.Sequential:
    """`bias` None gives one to the convolutions that no normalisation follows."""
    layer: Callable[..., nn.Module] | None = (lambda c: nn.GroupNorm(math.gcd(c, 32), c)) if norm == "group" else None
    blocks: list[nn.Module] = []
    for number in range(depth):
        inside = channels if number == 0 else width
        if kind == "plain":
            blocks.append(Conv2dNormActivation(inside, width, norm_layer=layer, inplace=False, bias=bias))
        else:
            deep = nn.Conv2d(inside, inside, 3, padding=1, groups=inside, bias=False)
            flat = Conv2dNormActivation(inside, width, 1, norm_layer=layer, inplace=False, bias=bias)
            blocks.append(nn.Sequential(deep, flat))
    return nn.Sequential(*blocks)


def _flatten(map_BCHW: Tensor, size: int) -> Tensor:
    """(B, anchors * size, H, W) to (B, H * W * anchors, size): row, column, anchor."""
    batch, _, rows, columns = map_BCHW.shape
    split = map_BCHW.view(batch, -1, size, rows, columns)
    return split.permute(0, 3, 4, 1, 2).reshape(batch, -1, size)


class ClassificationHead(nn.Module):
    """Tower and `cls_logits`; the bias starts at a foreground probability of `prior` (arXiv 1708.02002, section 3.3)."""

    def __init__(self, tower: nn.Sequential, width: int, anchors: int, classes: int, prior: float = 0.01) -> None:
        super().__init__()
        self.conv = tower
        self.cls_logits = nn.Conv2d(width, anchors * classes, 3, padding=1)
        self.classes = classes
        self.prior = prior

    def forward(self, levels: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Tensor]:
        """Level maps BCHW to (tower maps, logits_BAK)."""
        towers = tuple(self.conv(level) for level in levels)
        return towers, torch.cat([_flatten(self.cls_logits(tower), self.classes) for tower in towers], 1)


class RegressionHead(nn.Module):
    """Tower and `bbox_reg`."""

    def __init__(self, tower: nn.Sequential, width: int, anchors: int) -> None:
        super().__init__()
        self.conv = tower
        self.bbox_reg = nn.Conv2d(width, anchors * 4, 3, padding=1)

    def forward(self, levels: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Tensor]:
        """Level maps BCHW to (tower maps, deltas_BA4)."""
        towers = tuple(self.conv(level) for level in levels)
        return towers, torch.cat([_flatten(self.bbox_reg(tower), 4) for tower in towers], 1)


@dataclass(frozen=True)
class Distances:
    """How the distances to a box's sides are told: in strides behind a ReLU, as torchvision does, or in pixels by exp, where
    `strides` of the levels are needed; with a learnt factor for each of `scales` levels, or none; and on which tower the
    centerness stands. The published FCOS (arXiv 1904.01355) and OpenMMLab's have exp, factors, and the class tower."""

    kind: Literal["relu", "exp"] = "relu"
    strides: tuple[int, ...] = ()
    scales: int = 0
    centerness: Literal["box", "class"] = "box"


class DistanceHead(RegressionHead):
    """FCOS's: distances to a box's four sides, never negative, and `bbox_ctrness` (arXiv 2006.09214)."""

    def __init__(self, tower: nn.Sequential, width: int, anchors: int, how: Distances) -> None:
        super().__init__(tower, width, anchors)
        self.bbox_ctrness = nn.Conv2d(width, anchors, 3, padding=1)
        self.how = how
        self.scales = nn.ParameterList(torch.ones(()) for _ in range(how.scales))

    def forward(self, levels: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Tensor]:
        """Level maps BCHW to (tower maps, distances_BA4 in anchor sides: left, top, right, bottom)."""
        towers = tuple(self.conv(level) for level in levels)
        maps = [_flatten(self.bbox_reg(tower), 4) for tower in towers]
        if self.how.scales:
            maps = [one * scale for one, scale in zip(maps, self.scales, strict=True)]
        if self.how.kind == "relu":
            return towers, functional.relu(torch.cat(maps, 1))
        return towers, torch.cat([one.exp() / side for one, side in zip(maps, self.how.strides, strict=True)], 1)

    def centerness(self, class_tower: tuple[Tensor, ...], box_tower: tuple[Tensor, ...]) -> Tensor:
        """The maps of both towers to the centerness logits (B, A)."""
        towers = class_tower if self.how.centerness == "class" else box_tower
        return torch.cat([_flatten(self.bbox_ctrness(tower), 1) for tower in towers], 1).squeeze(-1)


class DenseHead(nn.Module):
    """Both heads, `depth` convolutions each, `width` channels wide; `distances` makes them FCOS's: a DistanceHead, and
    biases in the towers whatever follows."""

    regression_head: RegressionHead

    def __init__(
        self,
        channels: int,
        width: int,
        depth: int,
        kind: TowerKind,
        norm: TowerNorm,
        anchors: int,
        classes: int,
        distances: Distances | None = None,
    ) -> None:
        super().__init__()
        out = width if depth else channels
        bias = True if distances else None
        tower = _tower(channels, width, depth, kind, norm, bias)
        self.classification_head = ClassificationHead(tower, out, anchors, classes)
        tower = _tower(channels, width, depth, kind, norm, bias)
        self.regression_head = (
            DistanceHead(tower, out, anchors, distances) if distances else RegressionHead(tower, out, anchors)
        )
        # N(0, .01) is RetinaNet's, for towers without normalisation; behind a norm the scale of the weights is free.
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # torch types a bias as optional; this convolution has one.
        prior = self.classification_head.prior
        nn.init.constant_(self.classification_head.cls_logits.bias, -math.log((1 - prior) / prior))  # type: ignore[arg-type]


def dense_head(config: DenseConfig, anchors: int, classes: int, distances: Distances | None = None) -> DenseHead:
    """The head that a detector's settings ask for, with `anchors` a cell."""
    width, depth = config.tower_channels, config.head_convs
    return DenseHead(
        config.neck_channels, width, depth, config.head_kind, config.head_norm, anchors, classes, distances
    )
