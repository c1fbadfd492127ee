"""Anchors by torchvision's generator, in one order everywhere: level, row, column, anchor."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from stages.detection.records import Anchors


class AnchorGrid(nn.Module):
    """Anchors of `scale * stride * 2^(k / octaves)` pixels and the given height/width ratios at every cell of every level.

    Sizes are truncated to whole pixels and cells are `canvas // rows` apart, as torchvision does: its published weights
    were trained with exactly these boxes (torchvision/models/detection/retinanet.py, anchor_utils.py).
    """

    def __init__(self, strides: tuple[int, ...], scale: float, octaves: int, ratios: tuple[float, ...]) -> None:
        super().__init__()
        sizes = tuple(tuple(int(scale * stride * 2 ** (k / octaves)) for k in range(octaves)) for stride in strides)
        self.generator = AnchorGenerator(sizes, (tuple(ratios),) * len(strides))
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
            boxes = torch.cat(self.generator(canvas, [one.expand(1, 1, *shape) for shape in shapes]))
            self._made = {key: Anchors(boxes, shapes, self.per_cell)}
        return self._made[key]
