"""Engines built by NVIDIA's own parser and builder, on a machine without a GPU."""

import json

import pytest

from deploy import cuda, sidecar
from deploy.backend import build_engine, open_backend
from deploy.contract import METADATA_KEY
from deploy.errors import DeployError
from deploy.onnx_proto import read

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed; pip install 'headstart[tensorrt-rtx]'")
TARGETS = ("7.5", "8.6", "12.0")


def build(onnx, file, **settings):
    return build_engine(onnx, file, "tensorrt_rtx", **({"compute_capabilities": TARGETS} | settings))


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_an_engine_of_the_files_precision_for_three_gpus(precision, new_convolution, tmp_path):
    onnx, file = new_convolution(precision), tmp_path / "model.engine"
    made = build(onnx, file, precision=precision)
    assert made["made_for"]["compute_capabilities"] == list(TARGETS)
    assert made["census"]["asked"] == precision
    assert [one["precision"] for one in made["census"]["requested"] if one["kind"] == "convolution"] == [precision]
    assert made["contract"] == read(onnx).metadata[METADATA_KEY]
    assert made["engine_bytes"] == file.stat().st_size > 1000
    assert not file.read_bytes().startswith(b"{")  # nothing of ours in front
    assert sidecar.read(file, "tensorrt_rtx").to_dict() == made
    assert json.loads(sidecar.beside(file).read_text()) == made
    assert sidecar.peek(file).command.endswith(f"--set 'batch=[1, 1, 8]' --set precision={precision}")  # for any GPU
    if cuda.obstacle():
        assert made["census"]["built"] is None
        assert "what was built is not known here" in made["census"]["sentence"]


@pytest.mark.parametrize(
    ("given", "asked", "message"),
    [
        ("fp32", "fp16", "the ONNX is fp32; export it with precision fp16"),
        ("fp32", "int8", "the ONNX is fp32; quantise it for TensorRT first"),
        ("fp16", "fp32", "the ONNX is fp16; export it with precision fp32"),
        ("uint8", "int8", "2 quantisers are uint8, such as quantise, and TensorRT would read them as int8"),
    ],
)
def test_another_precision_than_asked_for_is_refused(given, asked, message, new_convolution, tmp_path):
    with pytest.raises(DeployError, match=message):
        build(new_convolution(given), tmp_path / "model.engine", precision=asked)
    assert {one.name for one in tmp_path.iterdir()} == {f"{given}.onnx"}


def test_a_gpu_it_builds_nothing_for_is_named(new_convolution, tmp_path):
    with pytest.raises(
        DeployError, match=r"nothing for compute capability 8\.7; it knows 7\.5, .*tensorrt on the device"
    ):
        build(new_convolution("fp32"), tmp_path / "model.engine", compute_capabilities=["8.7"])
    with pytest.raises(DeployError, match="compute_capabilities is a list"):
        build(new_convolution("fp32"), tmp_path / "model.engine", compute_capabilities="8.6")


@pytest.mark.parametrize("batch", [(2, 1, 8), (0, 1, 1)])
def test_batches_are_least_best_most(batch, new_convolution, tmp_path):
    with pytest.raises(DeployError, match="least, best and most images are wanted, in that order"):
        build(new_convolution("fp32"), tmp_path / "model.engine", batch=batch)


def test_what_it_cannot_parse_or_read_is_named(new_convolution, new_model, new_contract, tmp_path):
    import onnx

    file = new_convolution("fp32")
    model = onnx.load(file)
    model.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(model, tmp_path / "strange.onnx")
    with pytest.raises(DeployError, match=r"strange\.onnx: tensorrt_rtx .* cannot parse it: .*NoSuchOperator"):
        build(tmp_path / "strange.onnx", tmp_path / "model.engine")
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "foreign.onnx")
    with pytest.raises(DeployError, match="carries no contract"):
        build(tmp_path / "foreign.onnx", tmp_path / "model.engine")
    other = new_model(tmp_path / "other.onnx", new_contract(output_names=("box", "scores", "labels")))
    with pytest.raises(DeployError, match="must take images and give box, scores, labels"):
        build(other, tmp_path / "model.engine")


def test_without_a_gpu_the_engine_is_refused_with_the_command(new_convolution, tmp_path):
    if not cuda.obstacle():
        pytest.skip("this machine has a GPU")
    build(new_convolution("fp32"), tmp_path / "model.engine")
    with pytest.raises(
        DeployError, match=r"cannot run here: cuda: .*deploy build fp32\.onnx ENGINE --backend tensorrt_rtx"
    ):
        open_backend(tmp_path / "model.engine")
    with pytest.raises(DeployError, match="for which GPUs"):
        build(new_convolution("fp32"), tmp_path / "model.engine", compute_capabilities=())
