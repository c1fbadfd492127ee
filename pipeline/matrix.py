"""Matrix: one node per combination of values, the names such nodes have, and how consumers fan out with them.

`matrix: {seed: [0, 1]}` on the stage `control` makes `control[seed=0]` and `control[seed=1]`; `control[seed=0]` refers
to one of them, `control` to both.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

Axes = Mapping[str, str | int | float | bool]

_REFERENCE = re.compile(r"([^\[\]\s]+)(?:\[([^\[\]]*)\])?")


def combinations(matrix: Mapping[str, list[Any]]) -> list[Axes]:
    """Return every combination of the values, the last axis fastest; of no axes, the one empty combination."""
    return [dict(zip(matrix, values, strict=True)) for values in product(*matrix.values())]


def text(value: object) -> str:
    """Return a value as a node's name shows it: as YAML writes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def label(stage: str, axes: Axes) -> str:
    """Return a node's name: `control[seed=0,lr=0.1]`, or the stage's own without axes."""
    inner = ",".join(f"{axis}={text(value)}" for axis, value in axes.items())
    return f"{stage}[{inner}]" if inner else stage


def problems(matrix: object, settings: Mapping[str, Any], known: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """Return what is wrong with a `matrix:` as (place below it, message)."""
    if not isinstance(matrix, dict) or not matrix:
        return [("", "give the values of settings, as {seed: [0, 1, 2]}")]
    found = []
    for axis, values in matrix.items():
        texts = [text(value) for value in values] if isinstance(values, list) else []
        if known is not None and axis not in known:
            found.append((f".{axis}", f"not a setting of this stage; there are: {', '.join(known)}"))
        elif axis in settings:
            found.append((f".{axis}", f"is also given as the setting {axis}={settings[axis]!r}; keep one"))
        if not texts or not all(isinstance(value, str | int | float) for value in values):
            found.append((f".{axis}", "give a list of numbers, words or true and false"))
        elif any(set(word) & set("[],= \t") for word in texts):
            found.append((f".{axis}", "a value here is part of a node's name and may have no space and none of []=,"))
        elif len(set(texts)) < len(texts):
            found.append((f".{axis}", f"has a value twice: {', '.join(texts)}"))
    return found


@dataclass(frozen=True)
class Reference:
    """A stage, or with `fixed` axes some of its nodes, as `needs` and the command line name them."""

    stage: str
    fixed: Mapping[str, str]

    @classmethod
    def parse(cls, given: object) -> "Reference":
        """Read `student` or `student[seed=0]`. Raises ValueError when it is neither."""
        match = _REFERENCE.fullmatch(given.strip()) if isinstance(given, str) else None
        pairs = [part.split("=") for part in (match[2] or "").split(",") if part.strip()] if match else []
        if not match or any(len(pair) != 2 for pair in pairs):
            raise ValueError(f'{given!r} is no stage; write a stage\'s name, or one of its nodes as "student[seed=0]"')
        return cls(match[1], {axis.strip(): value.strip() for axis, value in pairs})

    def selects(self, axes: Axes) -> bool:
        """Return whether a node of the stage with these axes is meant."""
        return all(axis in axes and text(axes[axis]) == value for axis, value in self.fixed.items())

    def free(self, axes: Axes) -> Axes:
        """Return the axes of a selected node that were not fixed: a consumer fans out along these."""
        return {axis: value for axis, value in axes.items() if axis not in self.fixed}

    def __str__(self) -> str:
        return label(self.stage, self.fixed)
