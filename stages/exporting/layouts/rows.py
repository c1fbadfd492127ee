"""One tensor, a row a detection: its box, its score, its class. What came out of NMS, or needed none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.exporting.layout import (
    BoxConfig,
    Canvas,
    Decoded,
    Floats,
    Layout,
    Nodes,
    Output,
    corner_nodes,
    corners,
)


class Rows(Layout):
    """One tensor (N, 6) of finished detections, as the end-to-end exports of YOLOv10 and YOLO26 give it."""

    Config = BoxConfig
    config: BoxConfig
    one_class = True

    def __init__(self, config: BoxConfig, outputs: Sequence[Output], classes: int, canvas: Canvas) -> None:
        super().__init__(config, outputs, classes, canvas)
        self.turned = self.single(6, "one tensor with 6 columns")

    @property
    def boxes(self) -> int:
        return self.outputs[0].shape[1 if self.turned else 0]

    def nodes(self) -> Nodes:
        rows = "Transpose<perm = [0, 2, 1]>(output_0)" if self.turned else "Identity(output_0)"
        corner = corner_nodes("box", self.config.box, self.config.unit, self.canvas)
        lines = (
            f"rows = {rows}",
            "box, score, number = Split<axis = -1>(rows, parts)",
            *corner.lines,
            "nearest = Round(number)",
            "of_class = Equal(nearest, every_class)",
            "class_scores = Where(of_class, score, nothing)",
        )
        constants: dict[str, NDArray[Any]] = {
            "parts": np.asarray([4, 1, 1], np.int64),
            "every_class": np.arange(self.classes, dtype=np.float32),
            "nothing": np.asarray(0, np.float32),
        }
        return Nodes(lines, {**corner.constants, **constants})

    def decode(self, outputs: Sequence[Floats]) -> Decoded:
        rows_BNC = outputs[0].swapaxes(1, 2) if self.turned else outputs[0]
        numbers_BN = rows_BNC[..., 5].round().astype(np.int64)
        image, row = np.nonzero((numbers_BN >= 0) & (numbers_BN < self.classes))
        scores_BNK = np.zeros((*numbers_BN.shape, self.classes), np.float32)
        scores_BNK[image, row, numbers_BN[image, row]] = rows_BNC[image, row, 4]
        return Decoded(corners(rows_BNC[..., :4], self.config.box, self.config.unit, self.canvas), scores_BNK, None)
