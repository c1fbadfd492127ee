"""An engine's life on a GPU, played by stand-ins that hold device memory on the host. No GPU and no TensorRT ran here:
what is tested is our part, which buffer goes where, when, and what is refused."""

import ctypes
import json
import sys
import types
from dataclasses import replace

import numpy as np
import pytest

from deploy import cuda
from deploy.backend import open_backend
from deploy.backends.tensorrt import TensorRT
from deploy.census import take
from deploy.cuda import Cuda
from deploy.errors import DeployError
from deploy.sidecar import publish
from deploy.trt_session import Session, built

BOXES, SCORES = np.arange(16, dtype=np.float32).reshape(4, 4), np.asarray([0.9, 0.8, 0.7, 0.6], np.float32)


class Driver:
    """libcuda, with the host's memory; a stream that is captured records what it is given."""

    def __init__(self, devices=1):
        self.devices, self.calls, self.memory, self.graphs, self.captured = devices, [], {}, {}, None

    def __getattr__(self, name):
        def call(*arguments):
            self.calls.append(name)
            return getattr(type(self), f"_{name}", lambda *_: 0)(self, *arguments) or 0

        return call

    def do(self, work):
        if self.captured is None:
            work()
        else:
            self.captured.append(work)

    def _cuDeviceGetCount(self, count):
        count._obj.value = self.devices

    def _cuDeviceGetName(self, name, size, device):
        name.value = b"Stand-in"

    def _cuDriverGetVersion(self, version):
        version._obj.value = 13020

    def _cuDeviceGetAttribute(self, value, attribute, device):
        value._obj.value = {75: 8, 76: 6}[attribute]

    def _cuStreamCreate(self, stream, flags):
        stream._obj.value = 7

    def _cuMemAlloc_v2(self, address, size):
        if size.value > 1 << 24:
            return 2
        buffer = ctypes.create_string_buffer(size.value)
        address._obj.value = ctypes.addressof(buffer)
        self.memory[address._obj.value] = buffer
        return 0

    def _cuMemFree_v2(self, address):
        del self.memory[address.value]

    def _cuMemcpyHtoDAsync_v2(self, target, source, size, stream):
        self.do(lambda: ctypes.memmove(target.value, source.value, size.value))

    def _cuMemcpyDtoHAsync_v2(self, target, source, size, stream):
        self.do(lambda: ctypes.memmove(target.value, source.value, size.value))

    def _cuStreamBeginCapture_v2(self, stream, mode):
        self.captured = []

    def _cuStreamEndCapture(self, stream, graph):
        graph._obj.value = len(self.graphs) + 1
        self.graphs[graph._obj.value], self.captured = self.captured, None

    def _cuGraphInstantiateWithFlags(self, made, graph, flags):
        made._obj.value = graph.value

    def _cuGraphLaunch(self, graph, stream):
        for work in self.graphs[graph.value]:
            work()

    def _cuGetErrorString(self, code, text):
        text._obj.value = b"out of memory"


class Context:
    """Finds the same boxes in every image, with scores scaled by its mean brightness."""

    def __init__(self, driver):
        self.driver, self.addresses, self.batch = driver, {}, 0

    def set_input_shape(self, name, shape):
        self.shape, self.batch = shape, shape[0]
        return shape[0] <= 8

    def get_tensor_shape(self, name):
        rest = {"images": self.shape[1:], "boxes": (4, 4), "scores": (4,), "labels": (4,)}[name]
        return (self.batch, *rest)

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream):
        assert stream == 7
        batch = self.batch

        def work():
            images = self.at("images", np.uint8, (batch, 64, 64, 3))
            self.at("boxes", np.float32, (batch, 4, 4))[:] = BOXES
            self.at("scores", np.float32, (batch, 4))[:] = images.mean((1, 2, 3))[:, None] / 255 * SCORES
            self.at("labels", np.int32, (batch, 4))[:] = [0, 0, 1, 1]

        self.driver.do(work)
        return True

    def at(self, name, dtype, shape):
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return np.frombuffer((ctypes.c_char * size).from_address(self.addresses[name]), dtype).reshape(shape)


LAYERS = {
    "Layers": [
        {
            "Name": "average",
            "LayerType": "CaskConvolution",
            "Inputs": [{"Format/Datatype": "Channel major FP16 format"}],
        },
        {"Name": "fused", "LayerType": "Myelin", "Inputs": [{"Format/Datatype": "Half"}]},
        "a name alone",
    ]
}


@pytest.fixture
def driver():
    return Driver()


@pytest.fixture
def trt(driver):
    """The module `tensorrt`, as far as a session asks it."""
    engine = types.SimpleNamespace(
        create_execution_context=lambda: Context(driver),
        get_tensor_dtype={"boxes": np.float32, "scores": np.float32, "labels": np.int32}.get,
        create_engine_inspector=lambda: types.SimpleNamespace(get_engine_information=lambda _: json.dumps(LAYERS)),
    )
    runtime = types.SimpleNamespace(deserialize_cuda_engine=lambda content: engine if content == b"plan" else None)
    return types.SimpleNamespace(
        __name__="tensorrt",
        __version__="11.0",
        ILogger=type("ILogger", (), {}),
        Runtime=lambda log: runtime,
        nptype=lambda kind: kind,
        LayerInformationFormat=types.SimpleNamespace(JSON=0),
    )


@pytest.fixture
def engine(tmp_path, model, contract):
    """A file that the stand-in takes, with its sidecar."""
    return tmp_path / "model.engine", publish(
        tmp_path / "model.engine",
        b"plan",
        model,
        backend="tensorrt",
        contract=contract.to_json(),
        made_for={"compute_capabilities": ["8.6"]},
        settings={"batch": [1, 1, 8], "precision": "fp32"},
        census=take("fp32", (), None),
        built_by={},
    )


def images(*greys):
    return np.stack([np.full((64, 64, 3), grey, np.uint8) for grey in greys])


@pytest.mark.parametrize("graph", [False, True])
def test_every_batch_size_gets_its_own_candidates(trt, engine, driver, graph):
    session = Session(trt, *engine, Cuda(driver), graph=graph)
    first = session.infer(images(255, 0, 51))
    kept = first.scores_BN.copy()
    np.testing.assert_allclose(first.scores_BN, np.outer([1, 0, 0.2], SCORES), rtol=1e-6)
    assert first.boxes_BN4.tolist() == [BOXES.tolist()] * 3
    assert first.labels_BN.dtype == np.int64
    np.testing.assert_allclose(session.infer(images(102)).scores_BN, [0.4 * SCORES], rtol=1e-6)
    np.testing.assert_allclose(session.infer(images(51, 51, 255)).scores_BN[2], SCORES, rtol=1e-6)
    np.testing.assert_array_equal(first.scores_BN, kept)
    assert driver.calls.count("cuGraphLaunch") == (3 if graph else 0)
    assert driver.calls.count("cuStreamBeginCapture_v2") == (2 if graph else 0)  # one for each size
    session.close()
    assert driver.memory == {}


def test_results_are_waited_for(trt, engine, driver):
    session = Session(trt, *engine, Cuda(driver))
    session.infer(images(255))
    last = [name for name in driver.calls if name.startswith("cu")][-2:]
    assert last == ["cuMemcpyDtoHAsync_v2", "cuStreamSynchronize"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((9, 64, 64, 3), np.uint8), "it takes 1 to 8 images together, given 9"),
        (np.zeros((1, 32, 64, 3), np.uint8), "images must be uint8 of shape"),
        (np.zeros((1, 64, 64, 3), np.float32), "images must be uint8 of shape"),
    ],
)
def test_other_images_are_refused(trt, engine, driver, given, message):
    session = Session(trt, *engine, Cuda(driver))
    with pytest.raises(DeployError, match=message):
        session.infer(given)


def test_an_engine_that_cannot_be_loaded_says_why(trt, engine, driver):
    file, described = engine
    file.write_bytes(b"another")
    with pytest.raises(DeployError, match=r"tensorrt 11\.0 cannot load it: no reason was given"):
        Session(trt, file, described, Cuda(driver))


def test_a_call_that_fails_is_an_error_in_the_drivers_words(trt, engine, driver):
    file, described = engine
    huge = replace(described, contract=described.contract.replace('"height": 64', '"height": 6400000'))
    with pytest.raises(DeployError, match=r"cuMemAlloc_v2 failed: out of memory \(code 2\)"):
        Session(trt, file, huge, Cuda(driver))


def test_a_driver_without_a_gpu():
    with pytest.raises(DeployError, match="the driver knows no GPU"):
        Cuda(Driver(devices=0))


def test_the_device_by_the_drivers_own_words(driver):
    found = {"device": "Stand-in", "compute_capability": "8.6", "driver_cuda": "13.2"}
    assert cuda.describe(driver) == Cuda(driver).describe() == found


def test_what_the_inspector_tells(trt, engine, driver):
    layers = Session(trt, *engine, Cuda(driver)).layers(trt)
    assert [(one.name, one.kind, one.precision) for one in layers] == [
        ("average", "convolution", "fp16"),
        ("fused", "Myelin", "fp16"),
        ("a name alone", "unknown", "unknown"),
    ]
    assert built({}) == ()


@pytest.fixture
def gpu(driver, trt, monkeypatch):
    """A machine that has the stand-ins for its GPU and its TensorRT."""
    monkeypatch.setattr(cuda, "_load", lambda: driver)
    monkeypatch.setitem(sys.modules, "tensorrt", trt)


@pytest.mark.parametrize(
    ("made_for", "message"),
    [
        (
            {"compute_capabilities": ["7.5"]},
            r"for compute capability 7\.5, Stand-in has 8\.6; build one here: deploy build",
        ),
        ({"versions": {"tensorrt": "10.3"}}, r"built by tensorrt 10\.3, here is 11\.0"),
        ({"architecture": "abacus"}, "it is for abacus"),
    ],
)
def test_an_engine_for_another_machine_is_refused(gpu, engine, made_for, message):
    file, described = engine
    replace(described, made_for=made_for).write(file)
    with pytest.raises(DeployError, match=message):
        open_backend(file)


def test_an_engine_for_this_machine_says_where_it_runs(gpu, engine):
    with open_backend(engine[0], cuda_graph=True) as backend:
        assert len(backend.infer(images(255))) == 1
        identity = backend.identity()
    assert identity == {
        "runtime": "tensorrt",
        "version": "11.0",
        "device": "Stand-in",
        "compute_capability": "8.6",
        "driver_cuda": "13.2",
        "precision": "fp32",
    }


def test_releases_this_code_is_not_for_are_refused(gpu, engine, trt):
    trt.__version__ = "8.6.1"
    assert "for releases 10 and 11, here is 8.6.1" in TensorRT.obstacle({})
