"""RetinaNet's head: a class tower and a box tower shared by all levels, and their output convolutions.

Module names are those of torchvision/models/detection/retinanet.py, so its weights load. Towers are returned after
their last ReLU, applied out of place: HEAD's CKD reads exactly these maps (methods: arXiv 2207.05345).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torchvision.ops.misc import Conv2dNormActivation

TowerKind = Literal["plain", "depthwise"]
TowerNorm = Literal["none", "group"]


def _tower(channels: int, width: int, depth: int, kind: TowerKind, norm: TowerNorm) -> nn.Sequential:
    layer: Callable[..., nn.Module] | None = (lambda c: nn.GroupNorm(math.gcd(c, 32), c)) if norm == "group" else None
    blocks: list[nn.Module] = []
    for number in range(depth):
        inside = channels if number == 0 else width
        if kind == "plain":
            blocks.append(Conv2dNormActivation(inside, width, norm_layer=layer, inplace=False))
        else:
            deep = nn.Conv2d(inside, inside, 3, padding=1, groups=inside, bias=False)
            blocks.append(nn.Sequential(deep, Conv2dNormActivation(inside, width, 1, norm_layer=layer, inplace=False)))
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


class DenseHead(nn.Module):
    """Both heads, `depth` convolutions each, `width` channels wide."""

    def __init__(
        self, channels: int, width: int, depth: int, kind: TowerKind, norm: TowerNorm, anchors: int, classes: int
    ) -> None:
        super().__init__()
        out = width if depth else channels
        self.classification_head = ClassificationHead(_tower(channels, width, depth, kind, norm), out, anchors, classes)
        self.regression_head = RegressionHead(_tower(channels, width, depth, kind, norm), out, anchors)
        # N(0, .01) is RetinaNet's, for towers without normalisation; behind a norm the scale of the weights is free.
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # torch types a bias as optional; this convolution has one.
        prior = self.classification_head.prior
        nn.init.constant_(self.classification_head.cls_logits.bias, -math.log((1 - prior) / prior))  # type: ignore[arg-type]
