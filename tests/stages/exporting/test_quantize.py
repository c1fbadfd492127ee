"""The quantize stage on a tiny student: what it makes, what it refuses, and that it keeps its budget or fails."""

import json
import shutil

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from deploy.predictor import Predictor
from pipeline.errors import UserError, VerdictError
from stages import export, quantize, validate
from stages.exporting import int8 as int8_of
from stages.exporting.int8 import Quantiser

CONFIG = {"images": 8, "held_out": 12, "sensitivity_images": 2, "max_ap_drop": 0.05}


@pytest.fixture(scope="module")
def int8(tmp_path_factory, digits, exported, make):
    return make(tmp_path_factory.mktemp("int8"), "int8", quantize, CONFIG, model=exported, data=digits)


def test_the_file_is_smaller_runs_and_carries_the_contract(int8, exported, digits):
    assert int8.precision == "int8"
    assert int8.source == exported.key
    assert int8.bytes < 0.6 * exported.bytes
    assert int8.contract == exported.contract
    with Predictor.open(int8.path(int8.file)) as predictor:
        (found,) = predictor([next(digits.folder("val").glob("*.jpg"))], 0.01)
        assert len(found)
        assert predictor.contract.classes == digits.classes


def test_it_tells_how_it_was_made(int8):
    told = int8.quantisation
    listed = json.loads(int8.path("calibration.json").read_text())
    assert (told.runtime, told.images, told.held_out, told.validation_images) == ("onnxruntime", 8, 12, 12)
    assert told.images_sha256 == listed["sha256"]
    costs = [one.disagreement for one in told.layers]
    assert costs == sorted(costs, reverse=True)
    assert costs[0] > 0
    assert {one.layer for one in told.layers if one.kept} == set(int8.float_layers)
    assert told.ap_before - told.ap_after <= told.max_ap_drop
    assert told.ap_drop_low <= told.ap_before - told.ap_after <= told.ap_drop_high
    assert "were found again" in int8.parity.sentence


def test_nothing_is_left_beside_it(int8):
    assert sorted(one.name for one in int8.directory.iterdir()) == ["calibration.json", "held_out.json", "model.onnx"]


def test_the_same_again_and_validation_images_are_only_compared(tmp_path, digits, exported, int8, monkeypatch, make):
    """They are gone as soon as their pixels are known: whoever looked at one again would fail."""
    shutil.copytree(digits.directory, tmp_path / "data")
    copied = digits.placed(tmp_path / "data", name="data", key="copied")
    compare = quantize.set_apart

    def compare_and_remove(*args):
        found = compare(*args)
        shutil.rmtree(copied.folder("val"))
        copied.annotations("val").unlink()
        return found

    monkeypatch.setattr(quantize, "set_apart", compare_and_remove)
    again = make(tmp_path, "int8", quantize, CONFIG, model=exported, data=copied)
    assert again.sha256 == int8.sha256
    assert again.quantisation == int8.quantisation


def test_a_file_for_tensorrt(tmp_path, digits, exported, make):
    made = make(tmp_path, "int8", quantize, {**CONFIG, "runtime": "tensorrt"}, model=exported, data=digits)
    types = {tensor.data_type for tensor in onnx.load(made.path(made.file)).graph.initializer}
    assert onnx.TensorProto.INT8 in types
    assert not types & {onnx.TensorProto.UINT8, onnx.TensorProto.INT32}


def scales(model):
    """The steps in which values are rounded, by the name of what is rounded; of weights one for each channel."""
    tensors = {one.name: numpy_helper.to_array(one) for one in onnx.load(model.path(model.file)).graph.initializer}
    return {name: value for name, value in tensors.items() if name.endswith("_scale")}


@pytest.mark.parametrize("calibration", ["entropy", "percentile"])
def test_outliers_are_cut_off(calibration, tmp_path, digits, exported, int8, make, monkeypatch):
    monkeypatch.setitem(int8_of.BINS, "entropy", {"num_bins": 256})  # the calibrator's time grows with their square
    config = {**CONFIG, "calibration": calibration, "max_ap_drop": 1.0}
    made = make(tmp_path, "int8", quantize, config, model=exported, data=digits)
    assert made.quantisation.calibration == calibration
    finer, coarser = scales(made), scales(int8)
    both = [name for name in finer.keys() & coarser.keys() if finer[name].ndim == 0]
    assert both
    assert all(finer[name] <= coarser[name] * (1 + 1e-6) for name in both)
    assert any(finer[name] < 0.999 * coarser[name] for name in both)


def test_weights_of_seven_bits(tmp_path, digits, exported, int8, make):
    config = {**CONFIG, "reduce_range": True, "max_ap_drop": 1.0}
    made = make(tmp_path, "int8", quantize, config, model=exported, data=digits)

    def largest(model):
        tensors = map(numpy_helper.to_array, onnx.load(model.path(model.file)).graph.initializer)
        return max(int(np.abs(one.astype(int)).max()) for one in tensors if one.dtype == np.int8 and one.ndim == 4)

    assert largest(made) <= 64 < largest(int8)


def test_nms_in_the_graph_stays_as_it_is(tmp_path, digits, student, make):
    config = {"parity_images": 4, "score_threshold": 0.1, "nms": "graph"}
    inside = make(tmp_path, "inside", export, config, checkpoint=student, data=digits)
    made = make(tmp_path, "int8", quantize, CONFIG, model=inside, data=digits)
    assert made.contract == inside.contract
    assert made.contract["nms"] == "graph"
    file = onnx.load(made.path(made.file))
    (suppression,) = [node for node in file.graph.node if node.op_type == "NonMaxSuppression"]
    given = {node.op_type for node in file.graph.node if set(node.output) & set(suppression.input)}
    assert "DequantizeLinear" not in given
    with Predictor.open(made.path(made.file)) as predictor:
        (found,) = predictor([next(digits.folder("val").glob("*.jpg"))], 0.1)
        assert len(found)


def test_both_are_measured_and_form_a_chain(tmp_path, digits, student, exported, int8, make):
    report = make(tmp_path, "accuracy", validate, {}, data=digits, checkpoints=[student], models=[exported, int8])
    assert [row.name for row in report.rows] == ["student", "onnx", "int8"]
    assert report.rows[2].source == exported.key


@pytest.fixture
def blinded(monkeypatch):
    """Calibrated on black images, every range is too small: AP collapses."""
    calibrate = Quantiser.calibrate

    def on_black(self, batches, calibration):
        calibrate(self, (np.zeros_like(batch) for batch in batches), calibration)

    monkeypatch.setattr(Quantiser, "calibrate", on_black)


def test_a_missed_budget_fails(tmp_path, digits, exported, blinded, make):
    config = {**CONFIG, "max_ap_drop": 0.0, "max_float_layers": 1}
    with pytest.raises(VerdictError, match=r"quantize: .* AP are lost on 12 held-out images .* 0 allowed; allow more"):
        make(tmp_path, "int8", quantize, config, model=exported, data=digits)


class Judge:
    """AP falls by 0.02 for each of three layers in eight bits."""

    annotations = None

    def accuracy(self, file):
        quantised = set() if file.name == "source" else set(file.read_text().split())
        return 0.5 - 0.02 * len(quantised & {"a", "b", "c"}), []


class Written:
    """A quantiser whose file lists the layers in eight bits."""

    def __init__(self, folder):
        self.source, self.folder = folder / "source", folder

    def write(self, chosen):
        file = self.folder / "attempt"
        file.write_text(" ".join(chosen))
        return file


@pytest.fixture
def search(tmp_path, monkeypatch):
    """The search for layers over that judge; returns the layers kept and those in the file."""
    monkeypatch.setattr(quantize, "paired_bootstrap", lambda *_: None)
    ranked = dict.fromkeys("abcdef", 0.1)

    def run(budget, most):
        config = quantize.Config(max_ap_drop=budget, max_float_layers=most)
        kept, _ = quantize.within_budget(config, Written(tmp_path), Judge(), ranked, tmp_path / "made")
        return kept, (tmp_path / "made").read_text().split()

    return run


@pytest.mark.parametrize(("budget", "kept"), [(0.07, ""), (0.05, "a"), (0.03, "ab"), (0.01, "abc")])
def test_the_fewest_most_sensitive_layers_are_kept(search, budget, kept):
    assert search(budget, 8) == (tuple(kept), [name for name in "abcdef" if name not in kept])


def test_more_layers_than_allowed_fail(search):
    with pytest.raises(VerdictError, match=r"2\.00 AP are lost on 200 held-out images with 2 layers in float \(a, b\)"):
        search(0.01, 2)


def test_only_a_float32_file_is_quantised(tmp_path, digits, int8, make):
    with pytest.raises(UserError, match="quantize: int8 is int8 for onnxruntime; give the fp32 export"):
        make(tmp_path, "twice", quantize, CONFIG, model=int8, data=digits)
