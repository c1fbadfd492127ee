"""Eight bits for two runtimes: what is quantised, what is not, and where every stored tensor comes from."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, numpy_helper

from pipeline.errors import VerdictError
from stages.exporting.int8 import Quantiser, unfit_for_tensorrt
from stages.exporting.tracing import traced


@pytest.fixture
def quantise(graph, images, tmp_path):
    """A function from runtime and layers to the quantised graph."""
    source = tmp_path / "float32.onnx"
    onnx.save(graph, source)

    def make(runtime, chosen=("stem", "head")):
        quantiser = Quantiser(source, runtime, False, tmp_path)
        quantiser.calibrate([images[:2], images[2:]], "minmax")
        made = onnx.load(quantiser.write(chosen))
        onnx.checker.check_model(made, full_check=True)
        return made

    return make


def integers(model):
    """Element types of all zero points."""
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    pairs = [node for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    return {stored[node.input[2]].data_type for node in pairs}


def inputs_of(model, name):
    """Operators that make the inputs of a node."""
    made = {output: node.op_type for node in model.graph.node for output in node.output}
    return [made.get(one, "stored") for one in next(n for n in model.graph.node if n.name == name).input]


def run(model, images):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"images": images})


@pytest.mark.parametrize("runtime", ["onnxruntime", "tensorrt"])
def test_layers_are_quantised_and_what_is_around_them_is_not(quantise, graph, images, runtime):
    made = quantise(runtime)
    for name in ("make_stem", "make_head_fine", "make_head_coarse"):
        assert inputs_of(made, name)[:2] == ["DequantizeLinear", "DequantizeLinear"]
    assert inputs_of(made, "make_fine") == ["Reshape", "stored"]
    assert inputs_of(made, "make_normal") == ["Transpose", "stored"]
    for found, whole in zip(run(made, images), run(graph, images), strict=True):
        assert 0 < np.abs(found - whole).max() < 0.05 * np.abs(whole).max()


def test_a_cpu_gets_uint8_activations_and_int32_biases(quantise):
    made = quantise("onnxruntime")
    assert integers(made) == {TensorProto.UINT8, TensorProto.INT8, TensorProto.INT32}
    weight = next(t for t in made.graph.initializer if t.name == "detector.stem.weight_quantized")
    assert weight.data_type == TensorProto.INT8
    assert "make_stem_out" not in {node.name for node in made.graph.node}  # the zero point is the rectifier


def test_tensorrt_gets_int8_around_zero_and_float_biases(quantise):
    made = quantise("tensorrt")
    assert integers(made) == {TensorProto.INT8}
    assert list(unfit_for_tensorrt(made)) == []
    assert inputs_of(made, "make_stem")[2] == "stored"
    pairs = [node.op_type for node in made.graph.node if "Linear" in node.op_type]
    assert pairs.count("QuantizeLinear") == pairs.count("DequantizeLinear")


def test_a_file_for_the_cpu_is_no_file_for_tensorrt(quantise):
    assert any("is not int8" in one for one in unfit_for_tensorrt(quantise("onnxruntime")))


def test_a_zero_point_is_no_file_for_tensorrt(quantise):
    made = quantise("tensorrt")
    name = next(node for node in made.graph.node if node.op_type == "QuantizeLinear").input[2]
    zero = next(tensor for tensor in made.graph.initializer if tensor.name == name)
    zero.CopyFrom(numpy_helper.from_array(np.asarray(3, np.int8), name))
    assert any("has a zero point" in one for one in unfit_for_tensorrt(made))


def test_a_layer_that_is_not_chosen_stays_in_float(quantise):
    made = quantise("onnxruntime", ["head"])
    assert inputs_of(made, "make_stem")[1:] == ["stored", "stored"]
    assert inputs_of(made, "make_head_fine")[1] == "DequantizeLinear"


@pytest.mark.parametrize("runtime", ["onnxruntime", "tensorrt"])
def test_every_tensor_is_traced(quantise, graph, runtime):
    learnt, constants = traced(quantise(runtime), graph, "quantize")
    assert learnt >= 4  # a bias that two convolutions share may be stored twice
    assert constants >= 4


def test_a_planted_tensor_is_found(quantise, graph):
    made = quantise("onnxruntime")
    made.graph.initializer.append(numpy_helper.from_array(np.arange(5, dtype=np.float32), "assistant.weight"))
    with pytest.raises(
        VerdictError, match=r"quantize: 1 stored tensors are not the float32 file's: assistant\.weight \[5\]"
    ):
        traced(made, graph, "quantize")


def test_a_changed_weight_is_found(quantise, graph):
    """By two steps of one number: half a step is rounding, more is another weight."""
    made = quantise("onnxruntime")
    weight = next(t for t in made.graph.initializer if t.name == "detector.stem.weight_quantized")
    array = numpy_helper.to_array(weight).copy()
    array.flat[0] += 2 if array.flat[0] < 100 else -2
    weight.CopyFrom(numpy_helper.from_array(array, weight.name))
    with pytest.raises(VerdictError, match=r"detector\.stem\.weight_quantized"):
        traced(made, graph, "quantize")
