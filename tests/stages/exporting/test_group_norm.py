import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from stages.exporting.group_norm import with_instance_norm

CHANNELS, GROUPS = 12, 3


@pytest.fixture
def normalising():
    """One pair of tensors that normalises two maps of different size, as a head does the levels of a pyramid."""
    rng = np.random.default_rng(0)
    weights = {name: rng.normal(size=CHANNELS).astype(np.float32) for name in ("weight", "bias")}
    sizes = {"fine": (6, 9), "coarse": (3, 5)}
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [
            node
            for name in sizes
            for node in (
                helper.make_node("Identity", [name], [f"{name}_in"]),
                helper.make_node(
                    "GroupNormalization",
                    [f"{name}_in", "weight", "bias"],
                    [f"{name}_out"],
                    f"node_{name}",
                    num_groups=GROUPS,
                    epsilon=1e-3,
                ),
            )
        ],
        "norms",
        [value(name, TensorProto.FLOAT, ["batch", CHANNELS, *size]) for name, size in sizes.items()],
        [value(f"{name}_out", TensorProto.FLOAT, ["batch", CHANNELS, *size]) for name, size in sizes.items()],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    graph.value_info.append(value("weight", TensorProto.FLOAT, [CHANNELS]))  # exporters write it
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    maps = {name: rng.normal(3, 2, (2, CHANNELS, *size)).astype(np.float32) for name, size in sizes.items()}
    return model, maps, weights


def test_it_is_what_pytorch_computes(normalising):
    model, maps, weights = normalising
    changed = with_instance_norm(model)
    onnx.checker.check_model(changed, full_check=True)
    assert "GroupNormalization" not in {node.op_type for node in changed.graph.node}
    session = onnxruntime.InferenceSession(changed.SerializeToString(), providers=["CPUExecutionProvider"])
    for found, given in zip(session.run(None, maps), maps.values(), strict=True):
        tensors = (torch.from_numpy(one) for one in (given, *weights.values()))
        given_t, weight, bias = tensors
        wanted = torch.nn.functional.group_norm(given_t, GROUPS, weight, bias, eps=1e-3)
        np.testing.assert_allclose(found, wanted.numpy(), atol=1e-5)


def test_learnt_tensors_keep_their_names_and_are_stored_once(normalising):
    model, _, weights = normalising
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in with_instance_norm(model).graph.initializer}
    for name, array in weights.items():
        np.testing.assert_array_equal(stored[name].ravel(), array)
    assert [tensor.name for tensor in model.graph.initializer] == ["weight", "bias"]  # the given one is as it was
    assert list(model.graph.initializer[0].dims) == [CHANNELS]
