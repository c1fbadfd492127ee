"""Census: the precision of every layer, as the network asks for it and as the runtime built it, and the verdict.

The two are never mixed. *Requested* is what the network's definition says, layer by layer; it is known wherever an
engine is built. *Built* is what the runtime says of the engine it made; it is None where the runtime cannot say, as
TensorRT without a GPU.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

PRECISIONS = ("fp32", "fp16", "bf16", "int8")
CONVOLUTION, PRODUCT = "convolution", "matrix product"
LEAST = 0.5  # share of the weighty layers in the precision asked for; the others are islands somebody kept on purpose


@dataclass(frozen=True)
class Layer:
    """`kind` is `convolution` or `matrix product`, whose time decides, or the runtime's own word; `precision` one of
    PRECISIONS or another type's name."""

    name: str
    kind: str
    precision: str


@dataclass(frozen=True)
class Census:
    """`verdict` is whether the weighty layers are what was asked for; the built ones where they are known."""

    asked: str
    requested: tuple[Layer, ...]
    built: tuple[Layer, ...] | None
    verdict: bool
    sentence: str

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {
            "requested": [asdict(layer) for layer in self.requested],
            "built": None if self.built is None else [asdict(layer) for layer in self.built],
        }


def take(asked: str, requested: Sequence[Layer], built: Sequence[Layer] | None) -> Census:
    """Counts the layers and judges them against what was asked for."""
    passed, sentence = judge(asked, requested, "the ONNX asks for")
    if built is None:
        sentence += "; what was built is not known here"
    elif not _weighty(built):
        sentence += f"; the runtime tells of {len(built)} fused layers only, not of what is inside"
    else:
        built_passed, told = judge(asked, built, "the runtime built")
        passed, sentence = passed and built_passed, f"{sentence}; {told}"
    return Census(asked, tuple(requested), None if built is None else tuple(built), passed, sentence)


def judge(asked: str, layers: Sequence[Layer], who: str) -> tuple[bool, str]:
    """Whether at least half of the convolutions and matrix products are in the precision, and a sentence that begins
    with `who` says so."""
    weighty = _weighty(layers)
    if not weighty:
        return False, f"{who} no convolution or matrix product at all"
    counts = Counter(layer.precision for layer in weighty)
    told = ", ".join(f"{count} in {precision}" for precision, count in counts.most_common())
    passed = counts[asked] >= LEAST * len(weighty)
    sentence = f"{who} {told}, of {len(weighty)} convolutions and matrix products"
    if not passed:
        return False, f"{sentence}; {asked} was asked for"
    others = [layer.name for layer in weighty if layer.precision != asked]
    return True, sentence + (f" (not in {asked}: {_listed(others)})" if others else "")


def precision_of(layers: Sequence[Layer]) -> str | None:
    """The precision of most convolutions and matrix products; None where there are none."""
    counts = Counter(layer.precision for layer in _weighty(layers))
    return counts.most_common(1)[0][0] if counts else None


def _weighty(layers: Sequence[Layer]) -> list[Layer]:
    return [layer for layer in layers if layer.kind in (CONVOLUTION, PRODUCT)]


def _listed(names: Sequence[str], most: int = 4) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
