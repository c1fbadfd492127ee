"""What an ONNX file says of itself, read with the standard library alone: its metadata, and which types it quantises to.

A device that builds an engine has no `onnx` package and often no ONNX Runtime. The file is protobuf: numbered fields,
each with its type or length, so what is not wanted, the weights above all, is skipped.
Sources: onnx.proto3 of https://github.com/onnx/onnx (field numbers); https://protobuf.dev/programming-guides/encoding
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from deploy.errors import DeployError

if TYPE_CHECKING:
    from collections.abc import Iterator

# Fields of ModelProto, GraphProto, NodeProto, AttributeProto, TensorProto and StringStringEntryProto.
_MODEL_GRAPH, _MODEL_METADATA = 7, 14
_GRAPH_NODE, _GRAPH_INITIALIZER = 1, 5
_NODE_INPUT, _NODE_OUTPUT, _NODE_NAME, _NODE_TYPE, _NODE_ATTRIBUTE = 1, 2, 3, 4, 5
_ATTRIBUTE_NAME, _ATTRIBUTE_INT, _ATTRIBUTE_TENSOR = 1, 3, 5
_TENSOR_TYPE, _TENSOR_NAME = 2, 8
_ENTRY_KEY, _ENTRY_VALUE = 1, 2

# TensorProto.DataType, as far as something is quantised to it.
_TYPES = {2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 17: "fp8", 18: "fp8", 19: "fp8", 20: "fp8"}
_TYPES |= {21: "uint4", 22: "int4", 23: "fp4"}


@dataclass(frozen=True)
class OnnxFile:
    """`metadata`: its metadata_props. `quantised`: name of each QuantizeLinear and DequantizeLinear to the type that it
    writes or reads, such as uint8 or int8."""

    metadata: dict[str, str]
    quantised: dict[str, str]


def read(path: Path) -> OnnxFile:
    """Reads a file. Raises DeployError when there is none or it is no ONNX."""
    try:
        model = memoryview(Path(path).read_bytes())
    except OSError as error:
        raise DeployError(f"{path}: no such ONNX file ({error})") from error
    try:
        fields = list(_fields(model))
        graphs = [_bytes(value) for number, value in fields if number == _MODEL_GRAPH]
        metadata = dict(_entry(_bytes(value)) for number, value in fields if number == _MODEL_METADATA)
        if len(graphs) != 1:
            raise ValueError(f"{len(graphs)} graphs")
        return OnnxFile(metadata, _quantised(graphs[0]))
    except (ValueError, IndexError, UnicodeDecodeError) as error:
        raise DeployError(f"{path}: not an ONNX file ({error}); export the model again") from error


def _quantised(graph: memoryview) -> dict[str, str]:
    nodes = [_bytes(value) for number, value in _fields(graph) if number == _GRAPH_NODE]
    types: dict[str, int] = {}  # of tensors that are constants
    for number, value in _fields(graph):
        if number == _GRAPH_INITIALIZER:
            name, kind = _tensor(_bytes(value))
            types[name] = kind
    found: dict[str, str] = {}
    for node in nodes:
        operator, name, inputs, outputs, numbers, tensor = _node(node)
        if operator == "Constant" and tensor is not None:
            types[outputs[0]] = _tensor(tensor)[1]
        if operator not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        # By its zero point; without one the standard says what is written, and what is read is a constant or was
        # written by a QuantizeLinear, which counts itself.
        tells = inputs[2:3] if operator == "QuantizeLinear" else [*inputs[2:3], *inputs[:1]]
        known = [types[one] for one in tells if one in types]
        kind = known[0] if known else numbers.get("output_dtype", 0)
        if kind or operator == "QuantizeLinear":
            found[name or outputs[0]] = _TYPES.get(kind or 2, f"type {kind}")
    return found


def _node(
    data: memoryview,
) -> tuple[str, str, list[str], list[str], dict[str, int], memoryview | None]:
    """Operator, name, inputs, outputs, attributes that are whole numbers, and the one that is a tensor."""
    operator = name = ""
    inputs: list[str] = []
    outputs: list[str] = []
    numbers: dict[str, int] = {}
    tensor = None
    for number, value in _fields(data):
        if number == _NODE_TYPE:
            operator = _text(value)
        elif number == _NODE_NAME:
            name = _text(value)
        elif number == _NODE_INPUT:
            inputs.append(_text(value))
        elif number == _NODE_OUTPUT:
            outputs.append(_text(value))
        elif number == _NODE_ATTRIBUTE:
            of = dict(_fields(_bytes(value)))
            if isinstance(whole := of.get(_ATTRIBUTE_INT), int):
                numbers[_text(of[_ATTRIBUTE_NAME])] = whole
            if _ATTRIBUTE_TENSOR in of:
                tensor = _bytes(of[_ATTRIBUTE_TENSOR])
    return operator, name, inputs, outputs, numbers, tensor


def _tensor(data: memoryview) -> tuple[str, int]:
    of = dict(_fields(data))
    name, kind = of.get(_TENSOR_NAME, memoryview(b"")), of.get(_TENSOR_TYPE, 0)
    return _text(name), kind if isinstance(kind, int) else 0


def _entry(data: memoryview) -> tuple[str, str]:
    of = dict(_fields(data))
    return _text(of[_ENTRY_KEY]), _text(of.get(_ENTRY_VALUE, memoryview(b"")))


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Number and value of each field of a message; ValueError where it is none."""
    place = 0
    while place < len(data):
        tag, place = _varint(data, place)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, place = _varint(data, place)
            yield number, value
            continue
        if wire == 2:
            length, place = _varint(data, place)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if place + length > len(data):
            raise ValueError("cut short")
        yield number, data[place : place + length]
        place += length


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def _bytes(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number where a message is wanted")
    return value


def _text(value: int | memoryview) -> str:
    return str(_bytes(value), "utf-8")
