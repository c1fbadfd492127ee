import re
from dataclasses import replace

import pytest

from deploy import selection
from deploy.errors import DeployError
from deploy.manifest import Model
from deploy.selection import Device, choose, judge, refusals, this_device

CPU = "Cortex-A78AE"
ORIN = Device(
    architecture="aarch64",
    cpu=CPU,
    gpu="Orin",
    compute_capability="8.7",
    driver="540.4",
    cuda="12.6",
    packages={"onnxruntime": "1.23.2", "tensorrt": "10.3.0.26"},
    providers=("cpu", "cuda"),
    backends=("onnxruntime", "tensorrt", "tensorrt_rtx"),
)


@pytest.fixture
def new_model(contract):
    def make(file="model.onnx", **changes):
        settings = {"sha256": "0", "backend": "onnxruntime", "precision": "fp32", "contract": contract}
        return Model(file, **(settings | changes))

    return make


@pytest.fixture
def engine(new_model):
    return lambda file="orin.engine", **made_for: new_model(
        file, backend="tensorrt", made_for={"compute_capabilities": ["8.7"]} | made_for, rebuild="make it"
    )


def test_a_provider_for_gpus_is_refused_without_one(new_model):
    """ONNX Runtime lists what it was built with, whatever the machine has."""
    device = replace(ORIN, gpu=None, packages={"onnxruntime": ""}, providers=("tensorrt", "cuda", "cpu"))
    model = new_model("model.onnx", backend="onnxruntime")
    for provider in ("cuda", "tensorrt"):
        assert refusals(model, provider, device) == [f"provider {provider} needs an NVIDIA GPU, and there is none here"]
    assert refusals(model, "cpu", device) == []


@pytest.mark.parametrize(
    ("made_for", "device", "reason"),
    [
        ({}, {}, None),
        ({"compute_capabilities": ["8.6"]}, {}, "made for compute capability 8.6, Orin here has 8.7"),
        ({"compute_capabilities": ["7.5", "8.7"]}, {}, None),
        ({"compute_capabilities": ["8.0+"]}, {}, None),
        ({"compute_capabilities": ["8.9+"]}, {}, "made for compute capability 8.9+"),
        ({"compute_capabilities": ["8.9+"]}, {"compute_capability": "12.0"}, None),
        ({}, {"compute_capability": None}, "there is no NVIDIA GPU here"),
        ({"architecture": "x86_64"}, {}, "made for x86_64 processors, this is aarch64"),
        ({"architecture": "aarch64"}, {}, None),
        ({"versions": {"tensorrt": "10.3.0.26"}}, {}, None),
        ({"versions": {"tensorrt": "10.3"}}, {}, None),
        ({"versions": {"tensorrt": "10.9.0.34"}}, {}, r"built by tensorrt 10\.9\.0\.34, installed is 10\.3\.0\.26"),
        ({"versions": {"tensorrt": "10.1"}}, {}, r"built by tensorrt 10\.1"),
        ({"versions": {"tensorrt": "10.1"}, "version_compatible": True}, {}, None),
        ({"versions": {"tensorrt": "10.9"}, "version_compatible": True}, {}, r"built by tensorrt 10\.9"),
        ({"versions": {"tensorrt": "9.1"}, "version_compatible": True}, {}, r"built by tensorrt 9\.1"),
        ({"driver": "535.1"}, {}, None),
        ({"driver": "560"}, {}, r"needs driver 560 or newer, there is 540\.4"),
        ({"driver": "535"}, {"driver": None}, "needs driver 535 or newer, there is none"),
        ({"cuda": "12"}, {}, None),
        ({"cuda": "13.0"}, {}, r"needs cuda 13\.0 or newer, there is 12\.6"),
        ({}, {"packages": {}}, r"tensorrt is not installed; pip install 'headstart\[gpu\]'"),
        ({}, {"backends": ("onnxruntime",)}, "this release has no backend tensorrt"),
    ],
)
def test_an_engine_runs_where_it_was_made_for(engine, made_for, device, reason):
    found = refusals(engine(**made_for), None, replace(ORIN, **device))
    if reason is None:
        assert found == []
    else:
        (sentence,) = found
        assert re.search(reason, sentence)


def test_every_reason_is_told(engine):
    found = refusals(
        engine(architecture="x86_64", cuda="13"), None, replace(ORIN, compute_capability="7.2", packages={})
    )
    assert len(found) == 4


def test_a_backend_of_ones_own_answers_for_itself(new_model):
    device = replace(ORIN, backends=(*ORIN.backends, "mine"))
    assert refusals(new_model(backend="mine"), None, device) == []


def test_the_fastest_measured_is_first(new_model, engine, timing):
    slow = new_model(latency=(timing(30, CPU),))
    int8 = new_model("int8.onnx", latency=(timing(12, CPU),))
    fast = replace(engine(), latency=(timing(2, "Orin", ""),))
    assert [one.model.file for one in judge([slow, int8, fast], ORIN)] == ["orin.engine", "int8.onnx", "model.onnx"]
    elsewhere = replace(ORIN, compute_capability="8.9", gpu="L4")
    assert choose([slow, int8, fast], elsewhere).model is int8


def test_a_time_of_this_device_counts_before_a_better_one_of_another(new_model, timing):
    a = new_model("a.onnx", latency=(timing(1, "Xeon"), timing(40, CPU)))
    b = new_model("b.onnx", latency=(timing(30, CPU),))
    first, second = judge([a, b], ORIN)
    assert (first.model, first.milliseconds, first.here) == (b, 30, True)
    assert (second.model, second.milliseconds) == (a, 40)
    other = replace(ORIN, cpu="Atom")
    assert choose([a, b], other).model is a
    assert choose([a, b], other).sentence() == "runs here, 1.00 ms on Xeon"
    assert first.sentence() == "runs here, 30.00 ms on a device like this"


def test_what_was_never_measured_comes_last_and_equals_keep_their_order(new_model, timing):
    never, also = new_model("never.onnx"), new_model("also.onnx")
    timed = new_model("timed.onnx", latency=(timing(99, "Xeon"),))
    assert [one.model for one in judge([never, also, timed], ORIN)] == [timed, never, also]


def test_an_unreliable_time_counts_only_alone(new_model, timing):
    noisy = timing(1, CPU, reliable=False)
    a = new_model("a.onnx", latency=(noisy, timing(50, CPU)))
    b = new_model("b.onnx", latency=(timing(20, CPU),))
    assert choose([a, b], ORIN).model is b
    assert choose([replace(a, latency=(noisy,)), b], ORIN).milliseconds == 1


def test_few_calls_have_a_mean(new_model, timing):
    row = timing(5, CPU)
    row["steps"]["end_to_end"]["p50"] = None
    assert choose([new_model(latency=(row,))], ORIN).milliseconds == 10


def test_a_file_is_run_by_the_provider_that_was_fastest_and_is_here(new_model, timing):
    model = new_model(latency=(timing(30, CPU), timing(4, "Orin", "CUDAExecutionProvider")))
    assert model.ways() == [None, "cuda"]
    best = choose([model], ORIN)
    assert (best.provider, best.milliseconds, best.here) == ("cuda", 4, True)
    without = replace(ORIN, providers=("cpu",))
    taken, refused = judge([model], without)
    assert (taken.provider, taken.milliseconds) == (None, 30)
    assert refused.sentence() == "refused: ONNX Runtime here has no provider cuda, it has cpu"
    assert choose([model], ORIN, "cpu").provider is None
    with pytest.raises(DeployError, match="has no provider openvino, it has cpu, cuda"):
        choose([model], ORIN, "openvino")


def test_nothing_that_runs_is_an_error_with_reasons_and_commands(engine):
    a, b = engine("a.engine", compute_capabilities=["7.5"]), engine("b.engine", versions={"tensorrt": "8.6"})
    with pytest.raises(DeployError) as caught:
        choose([a, b], ORIN)
    for part in ("a.engine: made for", "b.engine: built by tensorrt 8.6", "make one for this device: make it"):
        assert part in str(caught.value)
    assert str(caught.value).count("make it") == 1
    with pytest.raises(DeployError, match="release one for this device"):
        choose([replace(a, rebuild="")], ORIN)


def test_this_device_is_described(new_model, timing, monkeypatch):
    found = this_device()
    assert found.packages["onnxruntime"] == ""  # a version is looked for only where a model asks
    assert found.providers == ("cpu",)
    assert "onnxruntime" in found.backends
    asked = new_model(made_for={"versions": {"numpy": "1"}}, latency=(timing(1, "x", "CUDAExecutionProvider"),))
    asked = this_device([asked])
    assert asked.packages["numpy"][0].isdigit()
    assert "cpu" in asked.providers
    assert choose([new_model()], found).sentence() == "runs here, never measured"


@pytest.mark.parametrize("gpus", [[], [{"name": "a", "compute_capability": "8.6"}, {"name": "b"}]])
def test_the_gpu_is_that_which_cuda_puts_first(gpus, monkeypatch):
    monkeypatch.setattr(selection, "described", lambda: {"gpus": gpus, "driver": "1", "cuda": "2"})
    found = this_device()
    if gpus:
        assert (found.gpu, found.compute_capability, found.driver, found.cuda) == ("a", "8.6", "1", "2")
        return
    assert (found.gpu, found.compute_capability, found.driver, found.cuda) == (None,) * 4
