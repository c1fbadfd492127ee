"""One tensor, a row a box: its four numbers, its objectness if there is one, then a score a class."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stages.exporting.layout import (
    BoxConfig,
    BoxFormat,
    Canvas,
    Decoded,
    Floats,
    Layout,
    Nodes,
    Output,
    corner_nodes,
    corners,
)


class Columns(Layout):
    """One tensor (N, 4 + K), or turned round, as YOLOv8's 84 x 8400; with objectness (N, 5 + K), as YOLOv5's."""

    class Config(BoxConfig):
        """How the columns are read."""

        box: BoxFormat = "cxcywh"
        """Corners, centre and size, or the upper left corner and size."""
        objectness: bool = False
        """Whether the fifth column is an objectness, which multiplies the scores."""

    config: Config

    def __init__(self, config: Config, outputs: Sequence[Output], classes: int, canvas: Canvas) -> None:
        super().__init__(config, outputs, classes, canvas)
        self.objectness = config.objectness
        self.columns = 4 + int(config.objectness) + classes
        self.turned = self.single(self.columns, f"one tensor with {self.columns} columns")

    @property
    def boxes(self) -> int:
        return self.outputs[0].shape[1 if self.turned else 0]

    def nodes(self) -> Nodes:
        parts = [4, *([1] if self.objectness else []), self.classes]
        names = ["box", *(["objectness"] if self.objectness else []), "class_scores"]
        rows = "Transpose<perm = [0, 2, 1]>(output_0)" if self.turned else "Identity(output_0)"
        corner = corner_nodes("box", self.config.box, self.config.unit, self.canvas)
        lines = (f"rows = {rows}", f"{', '.join(names)} = Split<axis = -1>(rows, parts)", *corner.lines)
        return Nodes(lines, {**corner.constants, "parts": np.asarray(parts, np.int64)})

    def decode(self, outputs: Sequence[Floats]) -> Decoded:
        rows_BNC = outputs[0].swapaxes(1, 2) if self.turned else outputs[0]
        boxes_BN4 = corners(rows_BNC[..., :4], self.config.box, self.config.unit, self.canvas)
        if self.objectness:
            return Decoded(boxes_BN4, rows_BNC[..., 5:], rows_BNC[..., 4:5])
        return Decoded(boxes_BN4, rows_BNC[..., 4:], None)
