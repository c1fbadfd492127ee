"""Anchors by torchvision's generator, in one order everywhere: level, row, column, anchor."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from stages.detection.records import Anchors

AnchorKind = Literal["whole", "exact"]


class AnchorGrid(nn.Module):
    """Anchors of `scale * stride * 2^(k / octaves)` pixels and the given height/width ratios at every cell of every level.

    With the grid `whole`, sizes are truncated to whole pixels and cells are `canvas // rows` apart, as torchvision does: its
    published weights were trained with exactly these boxes (torchvision/models/detection/retinanet.py, anchor_utils.py).
    With `exact` neither, as OpenMMLab does (mmdet/models/task_modules/prior_generators/anchor_generator.py), and `offset`
    strides to the right of and below the corners of cells.
    """

    def __init__(
        self,
        strides: tuple[int, ...],
        scale: float,
        octaves: int,
        ratios: tuple[float, ...],
        grid: AnchorKind = "whole",
        offset: float = 0.0,
    ) -> None:
        super().__init__()
        exact = tuple(tuple(scale * stride * 2 ** (k / octaves) for k in range(octaves)) for stride in strides)
        whole = tuple(tuple(int(size) for size in level) for level in exact)
        self.generator = AnchorGenerator(whole, (tuple(ratios),) * len(strides))
        self.strides = strides if grid == "exact" else None
        if grid == "exact":
            self.generator.cell_anchors = [
                _around_zero(level, ratios) + offset * stride for level, stride in zip(exact, strides, strict=True)
            ]
        self.per_cell = octaves * len(ratios)
        self._made: dict[object, Anchors] = {}  # one canvas is used a million times

    def forward(self, levels: tuple[Tensor, ...], size: tuple[int, int]) -> Anchors:
        """Anchors for these level maps of a canvas of `size` (height, width), on the maps' device; float32 or better,
        whatever the maps are: in bfloat16 a box at 1,000 pixels can be told from its neighbours by 4 pixels only."""
        shapes = tuple((level.shape[-2], level.shape[-1]) for level in levels)
        dtype = torch.promote_types(levels[0].dtype, torch.float32)
        key = (shapes, size, levels[0].device, dtype)
        if key not in self._made:
            canvas = ImageList(torch.empty((1, 3, *size), device="meta"), [size])
            one = torch.empty((1, 1, 1, 1), device=levels[0].device, dtype=dtype)
            if self.strides is None:
                boxes = torch.cat(self.generator(canvas, [one.expand(1, 1, *shape) for shape in shapes]))
            else:
                self.generator.set_cell_anchors(dtype, levels[0].device)
                steps = [[torch.tensor(stride, device=levels[0].device)] * 2 for stride in self.strides]
                boxes = torch.cat(self.generator.grid_anchors([list(shape) for shape in shapes], steps))
            self._made = {key: Anchors(boxes, shapes, self.per_cell)}
        return self._made[key]


def _around_zero(sizes: tuple[float, ...], ratios: tuple[float, ...]) -> Tensor:
    """Boxes (ratios * sizes, 4) with their centre at zero: a ratio's sizes side by side, as torchvision orders them."""
    size = torch.tensor(sizes)
    root = torch.tensor(ratios).sqrt()[:, None]
    width, height = (size / root).flatten() / 2, (size * root).flatten() / 2
    return torch.stack([-width, -height, width, height], 1)
