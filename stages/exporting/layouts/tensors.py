"""A tensor of boxes and one of scores; with a third one, of classes, one score a box."""

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


class Tensors(Layout):
    """Boxes (N, 4) and scores (N, K), as DETR's kind; or boxes (N, 4), scores (N) and classes from 0 on (N)."""

    Config = BoxConfig
    config: BoxConfig

    def __init__(self, config: BoxConfig, outputs: Sequence[Output], classes: int, canvas: Canvas) -> None:
        super().__init__(config, outputs, classes, canvas)
        shapes = [one.shape for one in outputs]
        count = shapes[0][0] if shapes and shapes[0] else 0
        self.one_class = shapes == [(count, 4), (count,), (count,)]
        if not self.one_class and shapes != [(count, 4), (count, classes)]:
            raise self.refuse(f"boxes [N, 4] and scores [N, {classes}], or boxes [N, 4], scores [N] and classes [N]")

    @property
    def boxes(self) -> int:
        return self.outputs[0].shape[0]

    def nodes(self) -> Nodes:
        corner = corner_nodes("output_0", self.config.box, self.config.unit, self.canvas)
        if not self.one_class:
            return Nodes((*corner.lines, "class_scores = Identity(output_1)"), corner.constants)
        lines = (
            *corner.lines,
            "score = Unsqueeze(output_1, last)",
            "number = Unsqueeze(output_2, last)",
            "of_class = Equal(number, every_class)",
            "class_scores = Where(of_class, score, nothing)",
        )
        constants: dict[str, NDArray[Any]] = {
            "last": np.asarray([-1], np.int64),
            "every_class": np.arange(self.classes, dtype=np.float32),
            "nothing": np.asarray(0, np.float32),
        }
        return Nodes(lines, {**corner.constants, **constants})

    def decode(self, outputs: Sequence[Floats]) -> Decoded:
        boxes_BN4 = corners(outputs[0], self.config.box, self.config.unit, self.canvas)
        if not self.one_class:
            return Decoded(boxes_BN4, outputs[1], None)
        same_BNK = outputs[2][..., None] == np.arange(self.classes)
        return Decoded(boxes_BN4, (outputs[1][..., None] * same_BNK).astype(np.float32), None)
