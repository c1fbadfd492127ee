"""A float32 export in half precision, strongly typed: every tensor says its type, and no builder's flag is needed.

Layers compute in float16; what is before and behind them (normalisation, decoding, top-k) stays in float32, and so do
the layers that are named, as islands. ONNX Runtime ships a converter: it puts two casts around every node that stays,
so that coordinates would pass through float16 between two steps of the decoding; hence this one.

On a CPU, ONNX Runtime computes such a file in float32 and leaves out the roundings between: 10,000,000, which float16
does not have, passes as if it had. So what float16 does to the detections is measured on a twin that rounds explicitly.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from deploy.parity import Parity
from pipeline.errors import VerdictError
from pipeline.log import logger
from stages.exporting.layers import layers_of, named, nodes_of
from stages.exporting.search import fewest

_FLOAT, _HALF = TensorProto.FLOAT, TensorProto.FLOAT16
_ALWAYS_FLOAT = {("Resize", 2)}  # scales have no other type
_SUFFIX: dict[int, str] = {_HALF: "_half", _FLOAT: "_full"}


def lower(
    file: Path, parity: Callable[[Path], Parity], islands: Sequence[str] | None, most: int
) -> tuple[tuple[str, ...], Parity]:
    """Rewrite a float32 export in half precision; returns the layers left in float32 and the parity reached.

    The islands are those given by name or pattern, or else the fewest of the layers that bear it worst, `most` at most,
    with which `parity` of the twin has a good verdict; the one that came closest where none has.
    """
    model = onnx.load(file)
    layers = [layer.name for layer in layers_of(model)]
    twin = file.with_name("twin.onnx")
    tried: dict[tuple[str, ...], Parity] = {}

    def attempt(kept: tuple[str, ...]) -> Parity:
        onnx.save(rounding_twin(half(model, kept)), twin)
        tried[kept] = parity(twin)
        return tried[kept]

    try:
        if islands is not None:
            kept = named(islands, layers_of(model), "export: fp32_layers")
        elif attempt(()).verdict:
            kept = ()
        else:
            costs = {name: _cost(attempt(tuple(one for one in layers if one != name))) for name in layers}
            ranked = sorted(layers, key=lambda name: -costs[name])
            logger.info("float16 alone does not agree (%s); the worst: %s", tried[()].sentence, ", ".join(ranked[:3]))
            found = fewest(ranked, lambda names: attempt(names).verdict, most)
            kept = found if found is not None else tuple(ranked[: min(most, len(ranked))])
        reached = tried.get(kept) or attempt(kept)
    finally:
        twin.unlink(missing_ok=True)
    onnx.save(half(model, kept), file)
    onnx.checker.check_model(str(file), full_check=True)
    return kept, reached


def _cost(parity: Parity) -> float:
    """How far from agreement: lost and changed detections first, then the differences in tolerances."""
    differences = parity.max_box_px / parity.tolerance.box_px + parity.max_score / parity.tolerance.score
    return 1000.0 * (parity.unmatched + parity.label_mismatches) + differences


def half(model: onnx.ModelProto, islands: Collection[str] = ()) -> onnx.ModelProto:
    """The same graph with its layers in float16, but for those named in `islands`.

    Raises VerdictError where a weight is beyond float16's range or the result is not strictly typed.
    """
    layers = layers_of(model)
    inside = set(nodes_of(layers, [layer.name for layer in layers if layer.name not in islands]))
    changed = _Typed(model)
    for node in model.graph.node:
        changed.add(node, _HALF if node.name in inside else _FLOAT)
    return changed.finished()


class _Typed:
    """A graph written anew, node by node, each in its own precision, with a cast wherever a tensor has the other."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = onnx.ModelProto()
        self.model.CopyFrom(model)
        del self.model.graph.node[:], self.model.graph.value_info[:]
        typed = onnx.shape_inference.infer_shapes(model).graph
        values = [*typed.value_info, *typed.input, *typed.output]
        self.stored = {tensor.name: tensor for tensor in model.graph.initializer}
        self.floats = {value.name for value in values if value.type.tensor_type.elem_type == _FLOAT}
        self.floats |= {name for name, tensor in self.stored.items() if tensor.data_type == _FLOAT}
        self.types: dict[str, int] = {}  # of the float tensors made so far
        self.converted: dict[tuple[str, int], str] = {}

    def add(self, given: NodeProto, kind: int) -> None:
        """Append a node that computes in `kind`."""
        node = NodeProto()
        node.CopyFrom(given)
        for place, name in enumerate(given.input):
            wanted = _FLOAT if (given.op_type, place) in _ALWAYS_FLOAT else kind
            if name in self.floats and self.types.get(name, _FLOAT) != wanted:
                node.input[place] = self._as(name, wanted)
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == _FLOAT:
                attribute.i = kind
        self.types |= {name: kind for name in given.output if name in self.floats}
        self.model.graph.node.append(node)

    def finished(self) -> onnx.ModelProto:
        """The model, without tensors that nothing reads any more, and with every tensor's type inferred and checked."""
        graph = self.model.graph
        read = {name for node in graph.node for name in node.input}
        kept = [tensor for tensor in graph.initializer if tensor.name in read]
        del graph.initializer[:]
        graph.initializer.extend(kept)
        try:
            return onnx.shape_inference.infer_shapes(self.model, check_type=True, strict_mode=True)
        except onnx.shape_inference.InferenceError as problem:
            raise VerdictError(f"export: the graph in float16 is not strictly typed: {problem}") from problem

    def _as(self, name: str, wanted: int) -> str:
        """The name of this tensor in the other type, converted once."""
        known = self.converted.get((name, wanted))
        if known:
            return known
        made = self.converted[name, wanted] = name + _SUFFIX[wanted]
        if name not in self.stored:
            node = helper.make_node("Cast", [name], [made], name=f"{made}_cast", to=wanted)
            self.model.graph.node.append(node)
            return made
        values = numpy_helper.to_array(self.stored[name])
        largest = float(np.abs(values).max(initial=0))
        if largest > float(np.finfo(np.float16).max):
            raise VerdictError(f"export: {name} holds {largest:g}, beyond float16; name its layer in fp32_layers")
        self.model.graph.initializer.append(numpy_helper.from_array(values.astype(np.float16), made))
        return made


def rounding_twin(model: onnx.ModelProto) -> onnx.ModelProto:
    """A file in float32 that computes what a strongly typed one does where float16 is real: every value that has that type
    is rounded to it and widened again. Sums inside a node stay in float32, as GPUs have them."""
    twin = onnx.ModelProto()
    twin.CopyFrom(model)
    graph = twin.graph
    values = [*graph.value_info, *graph.output]
    halves = {value.name for value in values if value.type.tensor_type.elem_type == _HALF}
    del graph.node[:], graph.value_info[:]
    for tensor in graph.initializer:
        if tensor.data_type == _HALF:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    for given in model.graph.node:
        node = NodeProto()
        node.CopyFrom(given)
        casts = []
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == _HALF:
                attribute.i = _FLOAT
        for place, name in enumerate(given.output):
            if name in halves:
                node.output[place] = f"{name}_exact"
                rounded = [f"{name}_exact"], [f"{name}_rounded"]
                casts.append(helper.make_node("Cast", *rounded, name=f"{name}_rounds", to=_HALF))
                casts.append(helper.make_node("Cast", rounded[1], [name], name=f"{name}_widens", to=_FLOAT))
        graph.node.extend([node, *casts])
    return twin
