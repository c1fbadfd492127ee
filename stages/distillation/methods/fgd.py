"""FGD, focal and global distillation (arXiv 2111.11837; yzd-v/FGD mmdet/distillation/losses/fgd.py).

    L = sum over levels of 1 / B * sum over images of
          foreground * sum F A (S - T)^2 + background * sum G A (S - T)^2     focal: in boxes, and outside them
        + attention * (|a_S - a_T|_1 + |c_S - c_T|_1)                          attention of the student to the teacher's
        + relation * sum (R_S(S) - R_T(T))^2                                   global: each map with its context

F is 1 / area inside a box (the smallest box where they overlap), G is 1 / (places outside all boxes). a (places) and
c (channels) are the softmax of mean magnitudes over `temperature`, times their number; A = a_T c_T weighs both maps.
R adds a context block (arXiv 1904.11492) that learns with the student, one for each side.

Fits any two detectors with a pyramid. The errors are sums and grow with the canvas, the channels and the square of the
features' magnitude: the published weights are those of 256 channels at 1333 x 800, and a teacher with large features
can make this loss many times the detector's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from stages.detection.detector import Detector
from stages.distillation.method import DistillationBatch, DistillationMethod, MethodConfig
from stages.distillation.pairing import PairedMaps, Pairing


def attention(map_BCHW: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(B, H, W) that sums to H * W, and (B, C) that sums to C: where and in which channels the map is large."""
    magnitude = map_BCHW.abs()
    places, channels = magnitude.mean(1), magnitude.mean((2, 3))
    spatial = (places.flatten(1) / temperature).softmax(1).view_as(places) * places[0].numel()
    return spatial, (channels / temperature).softmax(1) * channels.shape[1]


def masks(
    boxes: Sequence[Tensor], canvas: Sequence[tuple[int, int]], shape: tuple[int, int], like: Tensor
) -> tuple[Tensor, Tensor]:
    """(B, H, W) weights of the objects' places and of the background's, for maps of `shape` (rows, columns).

    `boxes[b]` (n, 4) lie on a `canvas[b]` of (height, width) that the map covers. The original divides by the size of
    the image inside the canvas, so its masks drift with padding; that is reproduced by giving those sizes instead.
    """
    rows, columns = shape
    foreground = like.new_zeros(len(boxes), rows, columns)
    for mask, found, (height, width) in zip(foreground, boxes, canvas, strict=True):
        if not len(found):
            continue
        left, top, right, bottom = (
            found / found.new_tensor([width, height] * 2) * found.new_tensor([columns, rows] * 2)
        ).T
        left, top, right, bottom = left.floor(), top.floor(), right.ceil(), bottom.ceil()  # both ends belong to the box
        row, column = torch.arange(rows, device=like.device), torch.arange(columns, device=like.device)
        inside_rows = (row >= top[:, None]) & (row <= bottom[:, None])
        inside_columns = (column >= left[:, None]) & (column <= right[:, None])
        share = (1 / ((bottom + 1 - top) * (right + 1 - left))).to(like.dtype)
        mask.copy_((share[:, None, None] * (inside_rows[:, :, None] & inside_columns[:, None])).amax(0))
    background = (foreground == 0).to(like.dtype)
    return foreground, background / background.sum((1, 2), keepdim=True).clamp(min=1)


class Context(nn.Module):
    """A global context block (arXiv 1904.11492): what the map holds at the places that matter is added everywhere."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        narrow = max(channels // 2, 1)
        self.mask = nn.Conv2d(channels, 1, 1)
        self.add = nn.Sequential(
            nn.Conv2d(channels, narrow, 1), nn.LayerNorm([narrow, 1, 1]), nn.ReLU(), nn.Conv2d(narrow, channels, 1)
        )
        # As published: the block begins by adding nothing.
        nn.init.kaiming_normal_(self.mask.weight, nonlinearity="relu")
        last = self.add[-1]
        for parameter in (self.mask.bias, *last.parameters()):
            assert isinstance(parameter, nn.Parameter)
            nn.init.zeros_(parameter)

    def forward(self, map_BCHW: Tensor) -> Tensor:
        """BCHW to BCHW."""
        weight = self.mask(map_BCHW).flatten(2).softmax(2)
        pooled = (map_BCHW.flatten(2) * weight).sum(2)
        added: Tensor = map_BCHW + self.add(pooled[:, :, None, None])
        return added


class Terms(NamedTuple):
    """The four unweighted losses of a level."""

    foreground: Tensor
    background: Tensor
    attention: Tensor
    relation: Tensor


class FocalGlobal(nn.Module):
    """The loss of one level, with the two context blocks it learns."""

    def __init__(self, channels: int, temperature: float) -> None:
        super().__init__()
        self.context_student, self.context_teacher = Context(channels), Context(channels)
        self.temperature = temperature

    def forward(
        self, student_BCHW: Tensor, teacher_BCHW: Tensor, boxes: Sequence[Tensor], canvas: Sequence[tuple[int, int]]
    ) -> Terms:
        """Maps of equal shape; `boxes` and `canvas` as in `masks`. Each term is summed over an image and averaged over
        images."""
        teacher_BCHW = teacher_BCHW.detach()
        images, _, rows, columns = teacher_BCHW.shape
        foreground, background = masks(boxes, canvas, (rows, columns), teacher_BCHW)
        spatial, channels = attention(teacher_BCHW, self.temperature)
        own_spatial, own_channels = attention(student_BCHW, self.temperature)
        error = (student_BCHW - teacher_BCHW).square() * channels[:, :, None, None]
        focal = error.sum(1) * spatial
        difference = (own_spatial - spatial).abs().sum() + (own_channels - channels).abs().sum()
        related = self.context_student(student_BCHW) - self.context_teacher(teacher_BCHW)
        sums = (focal * foreground).sum(), (focal * background).sum(), difference, related.square().sum()
        return Terms(*(each / images for each in sums))


class FGD(DistillationMethod):
    """Focal and global distillation of the neck's levels; objects come from the ground truth."""

    class Config(MethodConfig):
        foreground: float = Field(default=1e-3, ge=0)
        """Weight inside the objects' boxes: 1e-3 for one-stage detectors, 5e-5 for two-stage, 1.6e-3 for anchor-free."""
        background: float = Field(default=5e-4, ge=0)
        """Weight outside them: 5e-4, 2.5e-5, 8e-4."""
        attention: float = Field(default=5e-4, ge=0)
        """Weight of the difference of attention: 5e-4, 5e-5, 8e-4."""
        relation: float = Field(default=5e-6, ge=0)
        """Weight of the difference of the maps with their context: 5e-6, 5e-7, 8e-6."""
        temperature: float = Field(default=0.5, gt=0)
        """Of the attention: smaller is sharper."""
        pairing: Pairing = "stride"
        """Levels of equal stride, or the finest with the finest; ours: the student's map is resized where sizes differ
        (the original refuses)."""

    def __init__(self, config: FGD.Config, student: Detector, teacher: Detector | None) -> None:
        super().__init__(config, student, teacher)
        assert teacher is not None
        self.config = config
        self.maps = PairedMaps("fgd", student, teacher, config.pairing)
        self.losses = nn.ModuleList(FocalGlobal(channels, config.temperature) for channels in self.maps.channels)

    def forward(self, batch: DistillationBatch) -> Mapping[str, Tensor]:
        canvas = [batch.features.size] * len(batch.targets.boxes)
        maps = self.maps(batch.features, batch.teacher_features)
        pairs = zip(self.losses, maps, strict=True)
        terms = [loss(mine, theirs, batch.targets.boxes, canvas) for loss, (mine, theirs) in pairs]
        summed = Terms(*(torch.stack(column).sum() for column in zip(*terms, strict=True)))
        return {name: getattr(self.config, name) * term for name, term in summed._asdict().items()}
