import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploy.contract import METADATA_KEY
from deploy.errors import DeployError
from deploy.onnx_proto import read


def test_metadata_is_that_of_onnx(model):
    of_onnx = {entry.key: entry.value for entry in onnx.load(model).metadata_props}
    assert read(model).metadata == of_onnx
    assert json.loads(of_onnx[METADATA_KEY])["classes"] == ["cat", "dog"]


@pytest.mark.parametrize(("precision", "kinds"), [("fp32", set()), ("int8", {"int8"}), ("uint8", {"int8", "uint8"})])
def test_what_is_quantised(new_convolution, precision, kinds):
    found = read(new_convolution(precision)).quantised
    assert set(found.values()) == kinds
    if precision == "uint8":
        assert found == {"quantise": "uint8", "dequantise": "uint8", "kernel_dequantise": "int8"}


def quantiser(tmp_path, inputs, constants=(), nodes=(), **attributes):
    node = helper.make_node("QuantizeLinear", inputs, ["q"], **attributes)
    taken = helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])
    given = helper.make_tensor_value_info("q", attributes.get("output_dtype", TensorProto.UINT8), [4])
    tensors = [numpy_helper.from_array(np.asarray(0.1, np.float32), "step"), *constants]
    graph = helper.make_graph([*nodes, node], "one", [taken], [given], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]), tmp_path / "one.onnx")
    return read(tmp_path / "one.onnx").quantised


def test_a_quantiser_without_a_zero_point_is_uint8_or_what_it_says(tmp_path):
    assert quantiser(tmp_path, ["x", "step"]) == {"q": "uint8"}
    assert quantiser(tmp_path, ["x", "step"], output_dtype=TensorProto.INT8) == {"q": "int8"}


def test_a_zero_point_may_be_a_constant_node(tmp_path):
    zero = numpy_helper.from_array(np.asarray(0, np.int8), "value")
    node = helper.make_node("Constant", [], ["zero"], value=zero)
    assert quantiser(tmp_path, ["x", "step", "zero"], nodes=[node]) == {"q": "int8"}


def test_what_is_no_onnx_is_named(tmp_path, model):
    with pytest.raises(DeployError, match=r"none\.onnx: no such ONNX file"):
        read(tmp_path / "none.onnx")
    for content in (b"", b"no model at all", model.read_bytes()[:-20]):
        (tmp_path / "broken.onnx").write_bytes(content)
        with pytest.raises(DeployError, match=r"broken\.onnx: not an ONNX file"):
            read(tmp_path / "broken.onnx")
