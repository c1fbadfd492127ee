"""Half precision: which tensors have it, what it does to values, and which layers are spared it."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator
from safetensors.torch import load_file, save_file

from deploy.parity import Parity, Tolerance
from deploy.predictor import Predictor
from pipeline.errors import UserError, VerdictError
from stages import export
from stages.exporting.layers import layers_of
from stages.exporting.precision import half, lower, rounding_twin
from stages.exporting.tracing import traced

IMAGES = np.random.default_rng(2).integers(0, 256, (2, 8, 8, 3), np.uint8)


def types_of(model):
    """Tensor to its element type."""
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True).graph
    return {value.name: value.type.tensor_type.elem_type for value in [*inferred.value_info, *inferred.output]}


def run(model, images):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"images": images})


def stored(model):
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def test_layers_are_half_and_what_is_around_them_is_not(graph):
    made = half(graph)
    types = types_of(made)
    assert {types[name] for name in ("stem", "stem_out", "smaller", "head_fine", "head_coarse")} == {
        TensorProto.FLOAT16
    }
    assert {types[name] for name in ("pixels", "normal", "flat_fine", "fine", "coarse")} == {TensorProto.FLOAT}
    onnx.checker.check_model(made, full_check=True)


def test_weights_are_rounded_once_and_nothing_else_is_stored(graph):
    weights = stored(half(graph))
    assert weights["detector.head.weight_half"].dtype == np.float16
    assert "detector.head.weight" not in weights
    assert weights["mean"].dtype == np.float32
    assert traced(half(graph), graph, "export") == (4, 4)


def test_an_island_stays_in_float32(graph):
    types = types_of(half(graph, ["head"]))
    assert types["head_fine"] == TensorProto.FLOAT
    assert types["stem_out"] == TensorProto.FLOAT16
    assert half(graph, ["head", "stem"]).graph.node == graph.graph.node


def test_the_twin_rounds_what_a_cpu_does_not(graph, images):
    """A value beyond float16 between two layers: ONNX Runtime's CPU hides it, hardware with float16 does not."""
    weights = {tensor.name: tensor for tensor in graph.graph.initializer}
    for name, factor in (("detector.stem.weight", 1e4), ("detector.stem.bias", 1e4), ("detector.head.weight", 1e-4)):
        scaled = numpy_helper.to_array(weights[name]) * np.float32(factor)
        weights[name].CopyFrom(numpy_helper.from_array(scaled, name))
    assert np.isfinite(run(graph, images)[0]).all()
    assert not np.isfinite(run(rounding_twin(half(graph)), images)[0]).all()
    assert np.isfinite(run(rounding_twin(half(graph, ["stem", "head"])), images)[0]).all()


def test_the_twin_is_what_half_precision_computes(graph, images):
    """Against ONNX's own reference, which has float16."""
    made = half(graph)
    expected = ReferenceEvaluator(made).run(None, {"images": images})
    for found, wanted, whole in zip(run(rounding_twin(made), images), expected, run(graph, images), strict=True):
        assert found.dtype == np.float32
        off = np.abs(found - wanted).max()
        assert off <= 0.02 * np.abs(wanted).max()
        assert 0 < np.abs(found - whole).max() < 0.02 * np.abs(whole).max()


def test_a_weight_beyond_float16_is_refused(graph):
    weight = next(tensor for tensor in graph.graph.initializer if tensor.name == "detector.stem.bias")
    weight.CopyFrom(numpy_helper.from_array(np.full(6, 1e6, np.float32), weight.name))
    with pytest.raises(VerdictError, match=r"detector\.stem\.bias holds 1e\+06, beyond float16; name its layer"):
        half(graph)
    half(graph, ["stem"])


CONFIG = {"precision": "fp16", "parity_images": 2, "score_threshold": 0.1, "candidates": 200}


def test_export_in_half_precision(tmp_path, digits, student, exported, make):
    made = make(tmp_path, "fp16", export, CONFIG, checkpoint=student, data=digits)
    assert made.precision == "fp16"
    assert made.float_layers == ()
    assert made.parity.passed
    assert 0 < made.parity.max_score < 1e-2  # it was rounded, and little
    assert made.bytes < 0.7 * exported.bytes
    assert made.initialisers == exported.initialisers
    assert not made.path("twin.onnx").exists()
    with Predictor.open(made.path(made.file)) as predictor:
        assert predictor.contract.classes == digits.classes


@pytest.fixture
def overflowing(tmp_path, student):
    """The same function with values beyond float16 between two convolutions."""
    state = load_file(student.path(student.weights))
    inside = "backbone.body.layer1"
    for key in ("bn1.weight", "bn1.bias"):
        state[f"{inside}.{key}"] *= 5e4
    state[f"{inside}.conv2.weight"] *= 2e-5
    (tmp_path / "weights").mkdir()
    save_file(state, tmp_path / "weights" / student.weights)
    return student.placed(tmp_path / "weights", name="student", key="overflowing")


def test_islands_are_found_where_half_precision_overflows(tmp_path, digits, overflowing, make):
    made = make(tmp_path, "fp16", export, CONFIG, checkpoint=overflowing, data=digits)
    assert set(made.float_layers) == {"backbone.body.layer1.conv1", "backbone.body.layer1.conv2"}
    assert made.parity.passed


def test_too_few_islands_fail(tmp_path, digits, overflowing, make):
    config = {**CONFIG, "fp32_layers": ["backbone.body.layer1.conv1"]}
    with pytest.raises(VerdictError, match="does not detect what PyTorch detects"):
        make(tmp_path, "fp16", export, config, checkpoint=overflowing, data=digits)


@pytest.fixture
def judged(graph, tmp_path):
    """The search over the two layers of the small graph, by what the twin's values are off, `limit` of their scale allowed."""
    file = tmp_path / "model.onnx"
    onnx.save(graph, file)
    wanted = np.concatenate([one.ravel() for one in run(graph, IMAGES)])

    def search(limit, most):
        def parity(twin):
            found = np.concatenate([one.ravel() for one in run(onnx.load(twin), IMAGES)])
            off = float(np.abs(found - wanted).max() / np.abs(wanted).max())
            good = off <= limit
            return Parity(1, 1, 0, 0, 0, off, 0.0, Tolerance(1.0, 1.0), good, f"off by {off:g}")

        return (*lower(file, parity, None, most), onnx.load(file))

    return search


def test_no_island_without_need(judged, graph):
    islands, reached, written = judged(0.02, 8)
    assert islands == ()
    assert reached.verdict
    assert written == half(graph)


def test_islands_until_it_agrees(judged, graph):
    """Nothing but float32 everywhere is as exact as this asks for."""
    islands, reached, written = judged(1e-6, 8)
    assert set(islands) == {"stem", "head"}
    assert reached.verdict
    assert written.graph.node == graph.graph.node


def test_no_more_islands_than_allowed(judged):
    islands, reached, _ = judged(1e-6, 1)
    assert len(islands) == 1
    assert not reached.verdict


def test_islands_by_hand(tmp_path, digits, student, make):
    config = {**CONFIG, "fp32_layers": ["head.*"]}
    made = make(tmp_path, "fp16", export, config, checkpoint=student, data=digits)
    names = [layer.name for layer in layers_of(onnx.load(made.path(made.file))) if layer.name.startswith("head")]
    assert list(made.float_layers) == names
    with pytest.raises(UserError, match=r"export: fp32_layers: no layer haed\.\*"):
        make(tmp_path, "wrong", export, {**CONFIG, "fp32_layers": ["haed.*"]}, checkpoint=student, data=digits)
