"""The head of RetinaNet, FCOS and GFL: a class tower and a box tower, and their output convolutions, for all levels.

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
TowerNorm = Literal["none", "group", "batch"]
Kernel = Literal[1, 3]


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
    """Group normalisation in the towers (needed when training from random weights), batch normalisation or none. Batch
    normalisation is folded away by the export, which is faster and quantises better; each level then has towers of its
    own, as the statistics of one level are not those of another."""
    head_kernel: Kernel = 3
    """Side of the output convolutions; 1 is for small heads, where they are most of the work."""

    @property
    def tower_channels(self) -> int:
        """Width of the towers' maps, those of the neck where a tower has no convolution."""
        return (self.head_channels if self.head_convs else None) or self.neck_channels


@dataclass(frozen=True)
class TowerShape:
    """Both towers of a head: `channels` in, `depth` convolutions, `width` out of each, for `levels` of a neck; `bias` None
    gives one to the convolutions that no normalisation follows."""

    channels: int
    width: int
    depth: int
    kind: TowerKind
    norm: TowerNorm
    levels: int
    bias: bool | None = None

    @property
    def out(self) -> int:
        """Channels of the towers' maps."""
        return self.width if self.depth else self.channels

    def build(self) -> nn.Sequential | nn.ModuleList:
        """One tower for all levels, or one for each."""
        if self.norm == "batch":
            return nn.ModuleList(self._tower() for _ in range(self.levels))
        return self._tower()

    def _tower(self) -> nn.Sequential:
        norms: dict[TowerNorm, Callable[..., nn.Module] | None] = {
            "none": None,
            "group": lambda c: nn.GroupNorm(math.gcd(c, 32), c),
            "batch": nn.BatchNorm2d,
        }
        layer = norms[self.norm]
        blocks: list[nn.Module] = []
        for number in range(self.depth):
            inside = self.channels if number == 0 else self.width
            if self.kind == "plain":
                blocks.append(Conv2dNormActivation(inside, self.width, norm_layer=layer, inplace=False, bias=self.bias))
            else:
                deep = nn.Conv2d(inside, inside, 3, padding=1, groups=inside, bias=False)
                flat = Conv2dNormActivation(inside, self.width, 1, norm_layer=layer, inplace=False, bias=self.bias)
                blocks.append(nn.Sequential(deep, flat))
        return nn.Sequential(*blocks)


def by_anchor(map_BCHW: Tensor, size: int) -> Tensor:
    """(B, anchors * size, H, W) to (B, H * W * anchors, size): row, column, anchor, the order of `Anchors`."""
    batch, _, rows, columns = map_BCHW.shape
    split = map_BCHW.view(batch, -1, size, rows, columns)
    return split.permute(0, 3, 4, 1, 2).reshape(batch, -1, size)


class Branch(nn.Module):
    """A tower, shared by all levels or one for each."""

    def __init__(self, shape: TowerShape) -> None:
        super().__init__()
        self.conv = shape.build()

    def tower(self, level: int) -> nn.Sequential:
        """The convolutions that the level of this index passes."""
        tower = self.conv if isinstance(self.conv, nn.Sequential) else self.conv[level]
        assert isinstance(tower, nn.Sequential)
        return tower

    def maps(self, levels: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Level maps BCHW to tower maps BCHW."""
        return tuple(self.tower(number)(level) for number, level in enumerate(levels))


class ClassificationHead(Branch):
    """Tower and `cls_logits`; the bias starts at a foreground probability of `prior` (arXiv 1708.02002, section 3.3)."""

    def __init__(self, shape: TowerShape, anchors: int, classes: int, kernel: Kernel = 3, prior: float = 0.01) -> None:
        super().__init__(shape)
        self.cls_logits = nn.Conv2d(shape.out, anchors * classes, kernel, padding=kernel // 2)
        self.classes = classes
        self.prior = prior

    def forward(self, levels: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Tensor]:
        """Level maps BCHW to (tower maps, logits_BAK)."""
        towers = self.maps(levels)
        return towers, torch.cat([by_anchor(self.cls_logits(tower), self.classes) for tower in towers], 1)


class RegressionHead(Branch):
    """Tower and `bbox_reg`, `numbers` for each side of each anchor."""

    numbers = 1

    def __init__(self, shape: TowerShape, anchors: int, kernel: Kernel = 3) -> None:
        super().__init__(shape)
        self.bbox_reg = nn.Conv2d(shape.out, anchors * 4 * self.numbers, kernel, padding=kernel // 2)

    def forward(self, levels: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Tensor]:
        """Level maps BCHW to (tower maps, deltas_BA4)."""
        towers = self.maps(levels)
        return towers, torch.cat([by_anchor(self.bbox_reg(tower), 4 * self.numbers) for tower in towers], 1)


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

    def __init__(self, shape: TowerShape, anchors: int, how: Distances, kernel: Kernel = 3) -> None:
        super().__init__(shape, anchors, kernel)
        self.bbox_ctrness = nn.Conv2d(shape.out, anchors, kernel, padding=kernel // 2)
        self.how = how
        self.scales = nn.ParameterList(torch.ones(()) for _ in range(how.scales))

    def forward(self, levels: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Tensor]:
        """Level maps BCHW to (tower maps, distances_BA4 in anchor sides: left, top, right, bottom)."""
        towers = self.maps(levels)
        maps = [by_anchor(self.bbox_reg(tower), 4) for tower in towers]
        if self.how.scales:
            maps = [one * scale for one, scale in zip(maps, self.scales, strict=True)]
        if self.how.kind == "relu":
            return towers, functional.relu(torch.cat(maps, 1))
        return towers, torch.cat([one.exp() / side for one, side in zip(maps, self.how.strides, strict=True)], 1)

    def centerness(self, class_tower: tuple[Tensor, ...], box_tower: tuple[Tensor, ...]) -> Tensor:
        """The maps of both towers to the centerness logits (B, A)."""
        towers = class_tower if self.how.centerness == "class" else box_tower
        return torch.cat([by_anchor(self.bbox_ctrness(tower), 1) for tower in towers], 1).squeeze(-1)


class DistributionHead(RegressionHead):
    """GFL's: logits over the distances 0, 1, ... `bins` - 1 anchor sides to each of a box's four sides (arXiv 2006.04388)."""

    def __init__(self, shape: TowerShape, anchors: int, bins: int, kernel: Kernel = 3) -> None:
        self.numbers = bins
        super().__init__(shape, anchors, kernel)

    def forward(self, levels: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Tensor]:
        """Level maps BCHW to (tower maps, sides_BA4N)."""
        towers, sides = super().forward(levels)
        return towers, sides.view(*sides.shape[:2], 4, self.numbers)


class DenseHead(nn.Module):
    """Both heads, with towers of one shape. `distances` makes the regression FCOS's, a DistanceHead, and gives its towers
    biases whatever follows; `bins` makes it GFL's, a DistributionHead."""

    regression_head: RegressionHead

    def __init__(
        self,
        shape: TowerShape,
        anchors: int,
        classes: int,
        kernel: Kernel = 3,
        distances: Distances | None = None,
        bins: int = 0,
    ) -> None:
        super().__init__()
        self.classification_head = ClassificationHead(shape, anchors, classes, kernel)
        if bins:
            self.regression_head = DistributionHead(shape, anchors, bins, kernel)
        elif distances:
            self.regression_head = DistanceHead(shape, anchors, distances, kernel)
        else:
            self.regression_head = RegressionHead(shape, anchors, kernel)
        towers = [*self.classification_head.conv.modules(), *self.regression_head.conv.modules()]
        deep = {id(module) for module in towers} if shape.kind == "depthwise" else set()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # N(0, .01) is RetinaNet's, for sums of 9 * 256 numbers. A depthwise convolution sums 9: it would put out
                # what passes it.
                if id(module) in deep:
                    nn.init.kaiming_normal_(module.weight, nonlinearity="linear" if module.groups > 1 else "relu")
                else:
                    nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if isinstance(self.regression_head, DistanceHead):
            # Distances begin at one anchor side: at 0, half of them lie behind a ReLU that gives no gradient, and may stay
            # there. torchvision begins at 0; our light heads did not get out.
            nn.init.ones_(self.regression_head.bbox_reg.bias)  # type: ignore[arg-type]
        # torch types a bias as optional; this convolution has one.
        prior = self.classification_head.prior
        nn.init.constant_(self.classification_head.cls_logits.bias, -math.log((1 - prior) / prior))  # type: ignore[arg-type]


def dense_head(
    config: DenseConfig, levels: int, anchors: int, classes: int, distances: Distances | None = None, bins: int = 0
) -> DenseHead:
    """The head that a detector's settings ask for, on `levels` of the neck with `anchors` a cell."""
    width, depth = config.tower_channels, config.head_convs
    bias = True if distances else None
    shape = TowerShape(config.neck_channels, width, depth, config.head_kind, config.head_norm, levels, bias)
    return DenseHead(shape, anchors, classes, config.head_kernel, distances, bins)
