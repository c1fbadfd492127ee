"""What every backend promises; a new file in deploy/backends is tested from the moment it exists."""

import numpy as np
import pytest

from deploy import sidecar
from deploy.backend import backend_class, build_engine, names, open_backend
from deploy.errors import DeployError
from deploy.predictor import Predictor


def images(count):
    return np.random.default_rng(0).integers(0, 256, (count, 64, 64, 3), np.uint8)


def opened(name, onnx, folder):
    """The backend's own file of an ONNX file, open; skipped, with its own words, where this machine cannot run it."""
    backend = backend_class(name)
    if problem := backend.obstacle({}):
        pytest.skip(problem)
    if backend.SUFFIX == ".onnx":
        return open_backend(onnx, name)
    file = folder / f"model{backend.SUFFIX}"
    build_engine(onnx, file, name)
    return open_backend(file)


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("count", [1, 3])
def test_candidates_are_those_of_onnx_runtime(name, count, new_convolution, tmp_path):
    onnx = new_convolution("fp32")
    with opened(name, onnx, tmp_path) as backend, open_backend(onnx, "onnxruntime") as reference:
        found, wanted = backend.infer(images(count)), reference.infer(images(count))
        kept = found.scores_BN.copy()
        backend.infer(images(count) // 2)
        assert backend.metadata() == reference.metadata()
        identity = backend.identity()
    np.testing.assert_allclose(found.scores_BN, wanted.scores_BN, rtol=1e-5)
    np.testing.assert_allclose(found.boxes_BN4, wanted.boxes_BN4, rtol=1e-5)
    np.testing.assert_array_equal(found.labels_BN, wanted.labels_BN)
    np.testing.assert_array_equal(found.scores_BN, kept)  # fresh arrays
    assert identity["runtime"] == name
    assert {"version", "device", "precision"} <= set(identity)


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("given", [np.zeros((1, 32, 64, 3), np.uint8), np.zeros((1, 64, 64, 3), np.float32)])
def test_other_images_are_refused(name, given, new_convolution, tmp_path):
    with (
        opened(name, new_convolution("fp32"), tmp_path) as backend,
        pytest.raises(DeployError, match="images must be uint8 of shape"),
    ):
        backend.infer(given)


@pytest.mark.parametrize("name", names())
def test_a_machine_that_cannot_run_it_says_why(name):
    problem = backend_class(name).obstacle({"versions": {name: "0.1"}, "compute_capabilities": ["0.0"]})
    if backend_class(name).SUFFIX == ".onnx":
        assert problem is None
    else:
        assert any(word in problem for word in ("not installed", "no NVIDIA driver", "knows no GPU", "0.1", "0.0"))


@pytest.mark.parametrize("name", [one for one in names() if backend_class(one).SUFFIX == ".onnx"])
def test_who_takes_the_onnx_file_builds_nothing(name, model, tmp_path):
    with pytest.raises(DeployError, match=f"backend {name} takes the ONNX file as it is"):
        build_engine(model, tmp_path / "x.engine", name, precision="fp32")


@pytest.fixture
def blob(new_convolution, tmp_path):
    """An engine that runs on any machine with OpenVINO."""
    if problem := backend_class("openvino").obstacle({}):
        pytest.skip(problem)
    build_engine(new_convolution("fp32"), tmp_path / "model.blob", "openvino")
    return tmp_path / "model.blob"


def test_an_engine_is_opened_by_its_sidecar(blob, white):
    with Predictor.open(blob) as predictor:
        assert predictor.backend.identity()["runtime"] == "openvino"
        (found,) = predictor([white])
    assert found.labels.tolist() == [0, 1, 1]


def test_an_engine_without_its_sidecar_is_refused(blob):
    sidecar.beside(blob).unlink()
    with pytest.raises(DeployError, match=r"sidecar model\.blob\.json is missing; .*deploy build MODEL\.onnx"):
        open_backend(blob, "openvino")


def test_the_sidecar_of_another_file_is_refused(blob):
    blob.write_bytes(blob.read_bytes() + b"\0")
    with pytest.raises(DeployError, match=r"its sidecar is of another file .* deploy build fp32\.onnx ENGINE"):
        open_backend(blob)


def test_an_engine_of_another_backend_is_refused(blob):
    with pytest.raises(DeployError, match="it is an engine of openvino, not of tensorrt_rtx"):
        open_backend(blob, "tensorrt_rtx")


def changed(engine, **values):
    found = sidecar.peek(engine).to_dict()
    sidecar.Sidecar(**(found | values)).write(engine)


def test_an_engine_of_another_release_or_machine_is_refused(blob):
    changed(blob, made_for={"versions": {"openvino": "2020.1"}})
    with pytest.raises(DeployError, match=r"built by OpenVINO 2020\.1, here is .*; build one here: deploy build"):
        open_backend(blob)
    changed(blob, made_for={"architecture": "abacus"})
    with pytest.raises(DeployError, match="it is for abacus, this is"):
        open_backend(blob)


def test_a_broken_sidecar_is_refused(blob):
    sidecar.beside(blob).write_text("{}")
    with pytest.raises(DeployError, match="not a sidecar of schema 1"):
        open_backend(blob)
    sidecar.beside(blob).write_text("no JSON")
    with pytest.raises(DeployError, match="a sidecar is wanted"):
        open_backend(blob)


def test_the_command_in_the_sidecar_builds_it_again(blob, tmp_path, capsys):
    from deploy.__main__ import main

    described = sidecar.peek(blob)
    words = described.command.split()
    words[words.index("ENGINE")], words[words.index("fp32.onnx")] = (
        str(tmp_path / "again.blob"),
        str(tmp_path / "fp32.onnx"),
    )
    assert words[0] == "deploy"
    assert main(words[1:]) == 0
    assert "fp32: the ONNX asks for 1 in fp32" in capsys.readouterr().out
    assert sidecar.peek(tmp_path / "again.blob").onnx_sha256 == described.onnx_sha256


def test_openvino_computes_in_float32_unless_asked(new_convolution, tmp_path):
    if problem := backend_class("openvino").obstacle({}):
        pytest.skip(problem)
    made = build_engine(new_convolution("fp32"), tmp_path / "model.blob", "openvino")
    assert {one["precision"] for one in made["census"]["built"] if one["kind"] == "convolution"} == {"fp32"}
    with open_backend(new_convolution("fp32"), "openvino") as backend:
        assert backend.identity()["precision"] == "fp32"


def test_openvino_builds_what_the_file_is_or_nothing(new_convolution, tmp_path):
    if problem := backend_class("openvino").obstacle({}):
        pytest.skip(problem)
    made = build_engine(new_convolution("uint8"), tmp_path / "int8.blob", "openvino", precision="int8")
    assert made["census"]["verdict"]
    assert [one["precision"] for one in made["census"]["built"] if one["kind"] == "convolution"] == ["int8"]
    with pytest.raises(DeployError, match=r"asks for 1 in fp32.*int8 was asked for"):
        build_engine(new_convolution("fp32"), tmp_path / "none.blob", "openvino", precision="int8")
    assert not (tmp_path / "none.blob").exists()
