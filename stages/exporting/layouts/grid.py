"""One tensor, a row a cell, not decoded: offsets in cells, logarithms of sizes, objectness, then a score a class.

YOLOX, arXiv 2107.08430: centre = (offset + cell) * stride, size = exp(logarithm) * stride.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from stages.exporting.layout import Canvas, Decoded, Floats, Layout, LayoutConfig, Nodes, Output, cells


class Grid(Layout):
    """One tensor (N, 5 + K) of cells that are not decoded, finest level first, as YOLOX's raw export."""

    class Config(LayoutConfig):
        """The levels."""

        strides: tuple[int, ...] = Field(default=(8, 16, 32), min_length=1)
        """Pixels from cell to cell in each level, in the order of the rows."""

    config: Config
    objectness = True

    def __init__(self, config: Config, outputs: Sequence[Output], classes: int, canvas: Canvas) -> None:
        super().__init__(config, outputs, classes, canvas)
        self.count = sum(len(cells(stride, canvas)[0]) for stride in config.strides)
        wanted = f"one tensor with {5 + classes} columns and {self.count} rows, by strides {list(config.strides)}"
        self.turned = self.single(5 + classes, wanted)
        if outputs[0].shape[1 if self.turned else 0] != self.count:
            raise self.refuse(wanted)

    @property
    def boxes(self) -> int:
        return self.count

    def nodes(self) -> Nodes:
        levels = [np.stack(cells(stride, self.canvas), 1) for stride in self.config.strides]
        strides = np.repeat(self.config.strides, [len(level) for level in levels])[:, None]
        rows = "Transpose<perm = [0, 2, 1]>(output_0)" if self.turned else "Identity(output_0)"
        lines = (
            f"rows = {rows}",
            "offset, logarithm, objectness, class_scores = Split<axis = -1>(rows, parts)",
            "place = Add(offset, cell)",
            "centre = Mul(place, stride)",
            "growth = Exp(logarithm)",
            "half = Mul(growth, half_a_stride)",
            "low = Sub(centre, half)",
            "high = Add(centre, half)",
            "decoded_boxes = Concat<axis = -1>(low, high)",
        )
        constants: dict[str, NDArray[Any]] = {
            "parts": np.asarray([2, 2, 1, self.classes], np.int64),
            "cell": np.concatenate(levels).astype(np.float32),
            "stride": strides.astype(np.float32),
            "half_a_stride": (strides / 2).astype(np.float32),
        }
        return Nodes(lines, constants)

    def decode(self, outputs: Sequence[Floats]) -> Decoded:
        rows_BNC = outputs[0].swapaxes(1, 2) if self.turned else outputs[0]
        decoded, start = [], 0
        for stride in self.config.strides:
            x, y = cells(stride, self.canvas)
            level = rows_BNC[:, start : start + len(x)].astype(np.float64)
            start += len(x)
            cx, cy = (level[..., 0] + x) * stride, (level[..., 1] + y) * stride
            width, height = np.exp(level[..., 2]) * stride, np.exp(level[..., 3]) * stride
            decoded.append(np.stack([cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2], -1))
        return Decoded(np.concatenate(decoded, 1).astype(np.float32), rows_BNC[..., 5:], rows_BNC[..., 4:5])
