"""Where the stored tensors of a file of lower precision come from: all from the float32 file that it was made of."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from pipeline.errors import VerdictError
from stages.exporting.layers import layers_of
from stages.exporting.onnx_file import content_of, says_nothing

Stored = dict[str, NDArray[Any]]


def traced(made: onnx.ModelProto, source: onnx.ModelProto, where: str) -> tuple[int, int]:
    """Count the stored tensors of `made`: learnt ones, which layers of `source` read, as they were, rounded to float16 or in
    eight bits within half a step; and constants: others of the source, and scales and zero points.

    Raises VerdictError naming those that are none of these.
    """
    old, new = (
        {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer} for model in (source, made)
    )
    inside = {name for layer in layers_of(source) for name in layer.nodes}
    read = [node.input for node in source.graph.node if node.name in inside and node.op_type != "Resize"]
    floats = {name for inputs in read for name in inputs if name in old and old[name].dtype.kind == "f"}
    learnt = {name for name in floats if not says_nothing(old[name])}
    foreign, found, constants = [], 0, 0
    for name, array in new.items():
        origin = _origin(name, array, new, old)
        if origin is not None:
            found, constants = found + (origin in learnt), constants + (origin not in learnt)
        elif name.endswith(("_scale", "_zero_point")):
            constants += 1
        else:
            foreign.append(f"{name} {list(array.shape)}")
    if foreign:
        raise VerdictError(
            f"{where}: {len(foreign)} stored tensors are not the float32 file's: {', '.join(foreign[:5])}"
        )
    return found, constants


def carried(made: onnx.ModelProto, source: onnx.ModelProto, where: str) -> tuple[int, int]:
    """Count the stored tensors of a foreign file in the one that was adapted from it: learnt ones, all of which it must
    hold bit for bit, and constants: those that carry nothing learnt, and those of the nodes around it.

    Raises VerdictError where one of them is missing.
    """
    there = {content_of(numpy_helper.to_array(tensor)) for tensor in made.graph.initializer}
    given = [(tensor.name, numpy_helper.to_array(tensor)) for tensor in source.graph.initializer]
    learnt = [(name, array) for name, array in given if not says_nothing(array)]
    if missing := [name for name, array in learnt if content_of(array) not in there]:
        raise VerdictError(f"{where}: {len(missing)} stored tensors of the file were lost: {', '.join(missing[:5])}")
    return len(learnt), len(made.graph.initializer) - len(learnt)


def _origin(name: str, array: NDArray[Any], new: Stored, old: Stored) -> str | None:
    """The tensor of the source that this one holds, by its name and its values; None where there is none."""
    for suffix, holds in (("", _equal), ("_half", _rounded), ("_quantized", _within_half_a_step)):
        whole = name.removesuffix(suffix)
        # The quantizer numbers the copies of a bias that several convolutions share.
        for origin in (whole, whole.rstrip("0123456789")):
            if whole + suffix == name and origin in old and holds(array, old[origin], name, origin, new):
                return origin
    return None


def _equal(array: NDArray[Any], values: NDArray[Any], *_: object) -> bool:
    return array.dtype == values.dtype and np.array_equal(array, values)


def _rounded(array: NDArray[Any], values: NDArray[Any], *_: object) -> bool:
    return array.dtype == np.float16 and np.array_equal(array, values.astype(np.float16))


def _within_half_a_step(integers: NDArray[Any], values: NDArray[Any], name: str, origin: str, new: Stored) -> bool:
    scales = [new[key] for key in (f"{name}_scale", f"{origin}_scale") if key in new]  # of a bias, of a weight
    if not scales:
        return False
    along_channels = (-1, *[1] * (values.ndim - 1)) if scales[0].size > 1 else ()
    step = scales[0].astype(np.float64).reshape(along_channels)
    return bool((np.abs(integers * step - values) <= 0.501 * step).all())
