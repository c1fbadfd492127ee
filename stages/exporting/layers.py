"""The layers of an exported detector: what keeps or changes its precision as one.

    images -> cast, normalise -> layer -> layer -> ... -> decode, top-k
                                 (convolutions and what follows them)

A layer is a weight with the convolutions that share it, one a level in a head, and the nodes between them and the next
convolutions: activations, normalisation, additions. What lies before the first layer and behind the last is no layer: it
computes in float32 whatever the layers do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import onnx

from pipeline.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Layer:
    """`name` is that of the weight in the detector, as in `head.regression_head.bbox_reg`; nodes are in the graph's order."""

    name: str
    convolutions: tuple[str, ...]
    followers: tuple[str, ...]

    @property
    def nodes(self) -> tuple[str, ...]:
        """Names of all of its nodes."""
        return self.convolutions + self.followers


def layers_of(model: onnx.ModelProto) -> list[Layer]:
    """The layers of a float32 export, in the order in which they first compute.

    Raises ValueError where nodes share a name or a convolution's weight is computed, so that nothing could be told apart.
    """
    names = [node.name for node in model.graph.node]
    if len(set(names)) < len(names):
        raise ValueError("layers: nodes of the graph share a name")
    weights = {tensor.name for tensor in model.graph.initializer}
    ahead = _ahead_of_a_convolution(model)
    found: dict[str, tuple[list[str], list[str]]] = {}
    owner: dict[str, tuple[int, str]] = {}  # tensor to the convolution that it comes from last: position, weight
    for position, node in enumerate(model.graph.node):
        if node.op_type == "Conv":
            if node.input[1] not in weights:
                raise ValueError(f"layers: the weight {node.input[1]} of {node.name} is no stored tensor")
            origin = (position, node.input[1])
            found.setdefault(node.input[1], ([], []))[0].append(node.name)
        else:
            before = [owner[name] for name in node.input if name in owner]
            if not before or node.name not in ahead:
                continue
            origin = max(before)
            found[origin[1]][1].append(node.name)
        owner |= dict.fromkeys(node.output, origin)
    return [Layer(layer_name(weight), tuple(own), tuple(after)) for weight, (own, after) in found.items()]


def layer_name(weight: str) -> str:
    """`detector.head.conv.0.weight` is the weight of `head.conv.0`."""
    return weight.removeprefix("detector.").removeprefix("foreign/").removesuffix(".weight")


def named(patterns: Sequence[str], layers: Sequence[Layer], where: str) -> tuple[str, ...]:
    """The layers that names or patterns (`head.*`) mean. Raises UserError for one that means none."""
    known = [layer.name for layer in layers]
    chosen: dict[str, None] = {}
    for pattern in patterns:
        fitting = [name for name in known if fnmatchcase(name, pattern)]
        if not fitting:
            raise UserError(f"{where}: no layer {pattern}{did_you_mean(pattern, known)}")
        chosen |= dict.fromkeys(fitting)
    return tuple(name for name in known if name in chosen)


def nodes_of(layers: Sequence[Layer], names: Sequence[str]) -> Iterator[str]:
    """The nodes of the layers of these names."""
    return (node for layer in layers if layer.name in names for node in layer.nodes)


def _ahead_of_a_convolution(model: onnx.ModelProto) -> set[str]:
    """Names of the nodes whose results reach a convolution."""
    wanted: set[str] = set()
    ahead = set()
    for node in reversed(model.graph.node):
        leads = not wanted.isdisjoint(node.output)
        if leads:
            ahead.add(node.name)
        if leads or node.op_type == "Conv":
            wanted.update(node.input)
    return ahead
