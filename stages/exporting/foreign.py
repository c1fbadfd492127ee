"""An ONNX detector that was made elsewhere, read: what it takes, what it gives, and its graph in the form of ours.

Its operators are brought to our version, stored tensors are told from inputs, nodes get names, and a batch of one becomes
any batch where the file really computes each image by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, inliner, numpy_helper, shape_inference, version_converter

from pipeline.errors import UserError
from stages.exporting.layout import Canvas, Output
from stages.exporting.onnx_file import OPSET, says_nothing

PREFIX = "foreign/"
IR_VERSION = 10
TYPES: dict[int, str] = {
    TensorProto.FLOAT: "float",
    TensorProto.FLOAT16: "float16",
    TensorProto.UINT8: "uint8",
    TensorProto.INT32: "int32",
    TensorProto.INT64: "int64",
}
_INPUTS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.UINT8)
_INT8 = {"ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul", "QuantizeLinear", "DynamicQuantizeLinear"}
_SAME = 1e-4  # of a value above 1, and absolutely below: what another order of sums may change


@dataclass(frozen=True, eq=False)
class Foreign:
    """`outputs` are all that the file gives; `dtype` is ONNX's number of the type that it takes."""

    file: Path
    model: onnx.ModelProto
    input: str
    dtype: int
    canvas: Canvas
    outputs: tuple[Output, ...]
    one_by_one: bool = False

    @property
    def metadata(self) -> dict[str, str]:
        """What whoever made it wrote into it."""
        return {entry.key: entry.value for entry in self.model.metadata_props}

    @property
    def numbers(self) -> int:
        """Numbers that it stores, but for shapes and fills of one value: what others call parameters."""
        stored = (numpy_helper.to_array(one) for one in self.model.graph.initializer)
        return sum(array.size for array in stored if not says_nothing(array))

    def chosen(self, names: Sequence[str] | None) -> tuple[Output, ...]:
        """The outputs of these names, or all. Raises UserError for a name that there is not."""
        known = {one.name: one for one in self.outputs}
        if unknown := [name for name in names or () if name not in known]:
            raise UserError(
                f"external: {self.file.name} has no output {', '.join(unknown)}; it has {', '.join(map(str, self.outputs))}"
            )
        return self.outputs if names is None else tuple(known[name] for name in names)

    def types(self, outputs: Sequence[Output]) -> list[int]:
        """ONNX's numbers of their types."""
        kinds = {one.name: one.type.tensor_type.elem_type for one in self.model.graph.output}
        return [kinds[one.name] for one in outputs]

    def session(self, model: onnx.ModelProto | None = None) -> Any:
        """Its original file on ONNX Runtime's CPU, or another form of it."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # it warns of stored tensors among the inputs
        given = str(self.file) if model is None else model.SerializeToString()
        return onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])

    def run(self, session: Any, images: NDArray[Any]) -> list[NDArray[np.float32]]:
        """All outputs for a batch as the graph takes it, each in float32."""
        wanted = [one.name for one in self.outputs]
        fed = images.astype(onnx.helper.tensor_dtype_to_np_dtype(self.dtype))
        return [np.asarray(one, np.float32) for one in session.run(wanted, {self.input: fed})]


def read(file: Path, layout: str, size: tuple[int, int] | None) -> Foreign:
    """Read a file whose one input is images in this layout; `size` is (height, width) where the file leaves it open.

    Raises UserError for what is no such file.
    """
    model = cleaned(file)
    if len(model.graph.input) != 1:
        names = ", ".join(one.name for one in model.graph.input)
        raise UserError(f"external: {file.name} has the inputs {names or 'none'}; one input of images is wanted")
    (given,) = model.graph.input
    dims = given.type.tensor_type.shape.dim
    kind = given.type.tensor_type.elem_type
    channels, sides = (1, (2, 3)) if layout == "nchw" else (3, (1, 2))
    shown = [dim.dim_param or dim.dim_value or "?" for dim in dims]
    if kind not in _INPUTS or len(dims) != 4 or dims[channels].dim_value not in (0, 3):
        raise UserError(
            f"external: {file.name} takes {given.name} {shown} of type {TensorProto.DataType.Name(kind)}; 3 channels at place "
            f"{channels} ({layout}) of float, float16 or uint8 are wanted; give another input.layout"
        )
    if dims[0].dim_value > 1:
        raise UserError(f"external: {file.name} takes batches of {dims[0].dim_value}; export it for 1 or any number")
    fixed = dims[sides[0]].dim_value, dims[sides[1]].dim_value
    if not all(fixed) and size is None:
        raise UserError(f"external: {file.name} takes images of any size {shown}; give input.size: [height, width]")
    if size is not None and any(a and a != b for a, b in zip(fixed, size, strict=True)):
        raise UserError(f"external: {file.name} takes images of {fixed}, input.size is {size}; leave it out")
    height, width = size or fixed
    for place, value in ((channels, 3), (sides[0], height), (sides[1], width)):
        dims[place].dim_value = value
    return Foreign(file, model, given.name, kind, Canvas(height, width), outputs_of(model, file))


def loaded(file: Path) -> onnx.ModelProto:
    """The file as it is. Raises UserError where it is not valid."""
    try:
        model = onnx.load(file)
        onnx.checker.check_model(model)
    except Exception as error:  # protobuf's, the checker's: nothing in common
        raise UserError(f"external: {file.name} is not a valid ONNX file ({_short(error)})") from error
    return model


def cleaned(file: Path) -> onnx.ModelProto:
    """The graph with our version of ONNX's operators, stored tensors that are no inputs, and nodes that have names.

    Raises UserError where it is not valid or cannot be brought to that version.
    """
    model = loaded(file)
    model.ir_version = max(IR_VERSION, model.ir_version)
    (opset,) = (one.version for one in model.opset_import if one.domain in ("", "ai.onnx"))
    if model.functions:
        model = inliner.inline_local_functions(model)
    _without_stored_inputs(model)
    if opset < OPSET:
        try:
            metadata = {entry.key: entry.value for entry in model.metadata_props}
            model = version_converter.convert_version(model, OPSET)
            onnx.helper.set_model_props(model, metadata)
        except Exception as error:  # the converter raises RuntimeError and its own
            raise UserError(
                f"external: {file.name} is of opset {opset} and cannot be brought to {OPSET} ({_short(error)}); export it "
                f"with opset {OPSET}"
            ) from error
    _without_stored_inputs(model)
    del model.graph.value_info[:]  # shapes of a batch of one
    _store_constants(model)
    for index, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{index}" if not node.name else f"{node.name}_{index}"
    return model


def precision_of(model: onnx.ModelProto) -> str:
    """fp32, fp16 or int8: of its convolutions."""
    if any(node.op_type in _INT8 for node in model.graph.node):
        return "int8"
    weights = {node.input[1] for node in model.graph.node if node.op_type == "Conv"}
    halves = {one.name for one in model.graph.initializer if one.data_type == TensorProto.FLOAT16}
    return "fp16" if weights & halves else "fp32"


def outputs_of(model: onnx.ModelProto, file: Path) -> tuple[Output, ...]:
    """The outputs for one image, by shape inference. Raises UserError where a size depends on the image."""
    one = onnx.ModelProto()
    one.CopyFrom(model)
    one.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    for value in one.graph.output:
        value.type.tensor_type.ClearField("shape")
    found = []
    for value in shape_inference.infer_shapes(one, data_prop=True).graph.output:
        tensor = value.type.tensor_type
        sizes = [dim.dim_value for dim in tensor.shape.dim]
        if (
            not tensor.HasField("shape")
            or not all(sizes)
            or len(sizes) < 2
            or sizes[0] != 1
            or tensor.elem_type not in TYPES
        ):
            shown = [dim.dim_param or dim.dim_value or "?" for dim in tensor.shape.dim]
            raise UserError(
                f"external: output {value.name} of {file.name} is {shown or 'of unknown shape'} for one image; tensors with a "
                "batch and a fixed number of boxes are wanted; export the model without its own NMS"
            )
        found.append(Output(value.name, tuple(sizes[1:])))
    return tuple(found)


def for_any_batch(foreign: Foreign, images: NDArray[np.float32]) -> Foreign:
    """The same for batches of any size, or marked as one that takes one image a call.

    It is for any batch if `images`, two or more that differ as the graph takes them, give together what each gives alone.
    Int8 that is scaled by the values it meets does not: there the neighbours in a batch change an image's detections.
    """
    opened = _opened(foreign)
    alone = [foreign.run(foreign.session(), image[None]) for image in images]
    try:
        together = foreign.run(foreign.session(opened), images)
    except Exception:  # ONNX Runtime's exceptions have no common class of their own
        together = []
    expected = [np.concatenate(parts) for parts in zip(*alone, strict=True)]
    same = len(together) == len(expected) and all(map(_agree, together, expected))
    if same:
        return replace(foreign, model=opened)
    return replace(foreign, model=_shaped(foreign, 1), one_by_one=True)


def _agree(a: NDArray[np.float32], b: NDArray[np.float32]) -> bool:
    # Each number by itself: boxes in pixels beside them would hide what changed in the scores.
    return a.shape == b.shape and bool((np.abs(a - b) <= _SAME * np.maximum(1, np.abs(b))).all())


def _shaped(foreign: Foreign, batch: int | str) -> onnx.ModelProto:
    """The graph whose input and outputs say this batch."""
    shaped = onnx.ModelProto()
    shaped.CopyFrom(foreign.model)
    first = shaped.graph.input[0].type.tensor_type.shape.dim[0]
    if isinstance(batch, str):
        first.dim_param = batch
    else:
        first.dim_value = batch
    for value, kind, known in zip(shaped.graph.output, foreign.types(foreign.outputs), foreign.outputs, strict=True):
        value.CopyFrom(onnx.helper.make_tensor_value_info(known.name, kind, [batch, *known.shape]))
    return shaped


def _opened(foreign: Foreign) -> onnx.ModelProto:
    """The graph for a batch of any size, with 0 (as it comes) for the 1 with which shapes of reshapings begin."""
    opened = _shaped(foreign, "batch")
    stored = {one.name: one for one in opened.graph.initializer}
    for node in opened.graph.node:
        shape = stored.get(node.input[1]) if node.op_type == "Reshape" else None
        if shape is None or any(one.name == "allowzero" and one.i for one in node.attribute):
            continue
        sizes = numpy_helper.to_array(shape).copy()
        if sizes.size and sizes[0] == 1:
            sizes[0] = 0
            node.input[1] = f"{node.name}_any_batch"
            opened.graph.initializer.append(numpy_helper.from_array(sizes, node.input[1]))
    return opened


def _without_stored_inputs(model: onnx.ModelProto) -> None:
    stored = {one.name for one in model.graph.initializer}
    inputs = [one for one in model.graph.input if one.name not in stored]
    del model.graph.input[:]
    model.graph.input.extend(inputs)


def _store_constants(model: onnx.ModelProto) -> None:
    """Tensors in Constant nodes become stored tensors, where quantisers and counts look for them."""
    kept = []
    for node in model.graph.node:
        values = [one.t for one in node.attribute if one.name == "value"] if node.op_type == "Constant" else []
        if values:
            model.graph.initializer.append(numpy_helper.from_array(numpy_helper.to_array(values[0]), node.output[0]))
        else:
            kept.append(node)
    del model.graph.node[:]
    model.graph.node.extend(kept)


def _short(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]
