"""Layout: what the outputs of a foreign detector mean. Implementations are the files of `layouts/`.

Each says it twice, as nodes of ONNX that go into the file and as numpy that never sees them: that both find the same in
real images is the proof of the adapted file.

Shape letters: B images, N boxes an image, K classes of the model, C columns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.config import BaseConfig
from pipeline.errors import UserError

Floats = NDArray[np.float32]
BoxFormat = Literal["xyxy", "cxcywh", "xywh"]


@dataclass(frozen=True)
class Output:
    """One output of the foreign graph; `shape` is without the batch."""

    name: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name} {list(self.shape)}"


@dataclass(frozen=True)
class Canvas:
    """The network's input in pixels."""

    height: int
    width: int


@dataclass(frozen=True)
class Nodes:
    """Lines of ONNX's text form that make `decoded_boxes` (B, N, 4), xyxy in pixels of the input, `class_scores` (B, N, K)
    and, where the layout has it, `objectness` (B, N, 1) of `output_0`, `output_1`, ...; and the tensors that they name. Names
    that begin with `tail_` are those of the nodes behind them."""

    lines: tuple[str, ...]
    constants: dict[str, NDArray[Any]] = field(default_factory=dict)


class Decoded(NamedTuple):
    """The same three, before activation; objectness is None where the layout has none."""

    boxes_BN4: Floats
    scores_BNK: Floats
    objectness_BN1: Floats | None


class LayoutConfig(BaseConfig):
    """What every layout is told."""

    outputs: tuple[str, ...] | None = None
    """Names of the file's outputs, in the order in which the layout wants them; all, in the file's order, if not given."""


class BoxConfig(LayoutConfig):
    """And how the four numbers of a box are read."""

    box: BoxFormat = "xyxy"
    """Corners, centre and size, or the upper left corner and size."""
    unit: bool = False
    """Whether boxes are in shares of the input's sides, from 0 to 1, and not in pixels."""


class Layout(ABC):
    """One meaning of outputs. A subclass has a nested `Config(LayoutConfig)`; `__init__` raises UserError, by `refuse`,
    where the shapes do not fit it."""

    Config: type[LayoutConfig]
    objectness: bool = False
    """Whether `nodes` make an objectness, by which the scores of the classes are multiplied."""
    one_class: bool = False
    """Whether a box has one score, of one class: those of the others are zeros, which no activation may touch."""

    def __init__(self, config: Any, outputs: Sequence[Output], classes: int, canvas: Canvas) -> None:
        self.config, self.outputs, self.classes, self.canvas = config, outputs, classes, canvas

    @property
    @abstractmethod
    def boxes(self) -> int:
        """N, the number of boxes that the graph gives for an image."""

    @abstractmethod
    def nodes(self) -> Nodes:
        """The nodes that go behind the foreign graph."""

    @abstractmethod
    def decode(self, outputs: Sequence[Floats]) -> Decoded:
        """The same in numpy, written apart from `nodes`; `outputs` are the foreign graph's, with their batch."""

    def refuse(self, wanted: str) -> UserError:
        """The error of outputs that are not of this layout."""
        name = type(self).__module__.rpartition(".")[2]
        given = ", ".join(map(str, self.outputs))
        return UserError(
            f"external: layout {name} wants {wanted}, for {self.classes} classes and an input of {self.canvas.height}x"
            f"{self.canvas.width}; the file gives {given} an image; give another layout, classes, or outputs in another order"
        )

    def single(self, columns: int, wanted: str) -> bool:
        """That there is one output of (N, columns) or (columns, N); whether it is the latter. Raises UserError."""
        shapes = [one.shape for one in self.outputs]
        if len(shapes) != 1 or len(shapes[0]) != 2 or columns not in shapes[0]:
            raise self.refuse(wanted)
        if shapes[0] == (columns, columns):
            raise self.refuse(f"{wanted} (rows and columns cannot be told apart here)")
        return shapes[0][0] == columns


def corner_nodes(box: str, kind: BoxFormat, unit: bool, canvas: Canvas) -> Nodes:
    """From the tensor `box` (B, N, 4) in some format to `decoded_boxes`; `unit` where it is in shares of the input's sides."""
    constants: dict[str, NDArray[Any]] = {}
    lines = []
    if unit:
        sides = canvas.width, canvas.height
        constants["input_sides"] = np.asarray([*sides, *sides], np.float32)
        lines.append(f"box_in_pixels = Mul({box}, input_sides)")
        box = "box_in_pixels"
    if kind == "xyxy":
        return Nodes((*lines, f"decoded_boxes = Identity({box})"), constants)
    lines.append(f"first, size = Split<axis = -1, num_outputs = 2>({box})")
    if kind == "cxcywh":
        constants["one_half"] = np.asarray(0.5, np.float32)
        lines += ["half = Mul(size, one_half)", "low = Sub(first, half)", "high = Add(first, half)"]
    else:
        lines += ["low = Identity(first)", "high = Add(first, size)"]
    return Nodes((*lines, "decoded_boxes = Concat<axis = -1>(low, high)"), constants)


def corners(box_BN4: Floats, kind: BoxFormat, unit: bool, canvas: Canvas) -> Floats:
    """The same in numpy."""
    a, b, c, d = np.moveaxis(box_BN4 * ([canvas.width, canvas.height] * 2 if unit else 1), -1, 0)
    if kind == "cxcywh":
        a, b, c, d = a - c / 2, b - d / 2, a + c / 2, b + d / 2
    elif kind == "xywh":
        c, d = a + c, b + d
    return np.stack([a, b, c, d], -1).astype(np.float32)


def cells(stride: int, canvas: Canvas) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Column and row of every cell of a level, row by row; a level covers the whole input, and its last cells may reach
    beyond."""
    rows, columns = (-(-side // stride) for side in (canvas.height, canvas.width))
    y, x = np.divmod(np.arange(rows * columns), columns)
    return x, y
