"""A tensor of scores and one of distributions a level: each side's distance from the cell's centre is a mean over bins.

Generalized Focal Loss, arXiv 2006.04388; PicoDet, arXiv 2111.00902, and NanoDet export it so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from stages.exporting.layout import Canvas, Decoded, Floats, Layout, LayoutConfig, Nodes, Output, cells


class Distributions(Layout):
    """Scores (N, K) of each level, then as many tensors (N, 4 bins) of logits over the distance of each side."""

    class Config(LayoutConfig):
        """The levels."""

        strides: tuple[int, ...] = Field(default=(8, 16, 32, 64), min_length=1)
        """Pixels from cell to cell in each level, and the unit of its bins."""
        centre: float = Field(default=0.5, ge=0, le=1)
        """Where in its cell the point lies from which distances are measured: 0 its corner, 0.5 its middle."""

    config: Config

    def __init__(self, config: Config, outputs: Sequence[Output], classes: int, canvas: Canvas) -> None:
        super().__init__(config, outputs, classes, canvas)
        self.counts = [len(cells(stride, canvas)[0]) for stride in config.strides]
        self.levels = len(self.counts)
        shapes = [one.shape for one in outputs]
        columns = shapes[-1][-1] if shapes and shapes[-1] else 0
        self.bins = columns // 4
        fitting = [(n, k) for k in (classes, 4 * self.bins) for n in self.counts]
        if shapes != fitting or self.bins < 2:
            raise self.refuse(
                f"{self.levels} tensors of scores and {self.levels} of 4 distributions, of {self.counts} rows"
            )

    @property
    def boxes(self) -> int:
        return sum(self.counts)

    def nodes(self) -> Nodes:
        names = [f"output_{index}" for index in range(2 * self.levels)]
        points = [np.stack(cells(stride, self.canvas), 1) + self.config.centre for stride in self.config.strides]
        strides = np.repeat(self.config.strides, self.counts)[:, None]
        lines = (
            f"class_scores = Concat<axis = 1>({', '.join(names[: self.levels])})",
            f"logits = Concat<axis = 1>({', '.join(names[self.levels :])})",
            "logits_BN4R = Reshape(logits, sides_and_bins)",
            "shares = Softmax<axis = -1>(logits_BN4R)",
            "means = MatMul(shares, bin)",
            "bins_away = Squeeze(means, last)",
            "distance = Mul(bins_away, stride)",
            "before, behind = Split<axis = -1, num_outputs = 2>(distance)",
            "low = Sub(point, before)",
            "high = Add(point, behind)",
            "decoded_boxes = Concat<axis = -1>(low, high)",
        )
        constants: dict[str, NDArray[Any]] = {
            "sides_and_bins": np.asarray([0, self.boxes, 4, self.bins], np.int64),
            "bin": np.arange(self.bins, dtype=np.float32)[:, None],
            "last": np.asarray([-1], np.int64),
            "stride": strides.astype(np.float32),
            "point": (np.concatenate(points) * strides).astype(np.float32),
        }
        return Nodes(lines, constants)

    def decode(self, outputs: Sequence[Floats]) -> Decoded:
        decoded = []
        for stride, logits_BNC in zip(self.config.strides, outputs[self.levels :], strict=True):
            x, y = ((one + self.config.centre) * stride for one in cells(stride, self.canvas))
            logits = logits_BNC.astype(np.float64).reshape(*logits_BNC.shape[:2], 4, self.bins)
            weights = np.exp(logits - logits.max(-1, keepdims=True))
            distance = (weights * np.arange(self.bins)).sum(-1) / weights.sum(-1) * stride
            left, top, right, bottom = np.moveaxis(distance, -1, 0)
            decoded.append(np.stack([x - left, y - top, x + right, y + bottom], -1))
        scores_BNK = np.concatenate(outputs[: self.levels], 1)
        return Decoded(np.concatenate(decoded, 1).astype(np.float32), scores_BNK, None)
