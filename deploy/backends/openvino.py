"""OpenVINO on the CPU, in float32 unless asked: an ONNX file as it is, or compiled ahead into a file that opens sooner."""

from __future__ import annotations

import importlib
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deploy import census, sidecar
from deploy.backend import Backend, Candidates
from deploy.census import CONVOLUTION, PRODUCT, Layer
from deploy.contract import METADATA_KEY, Contract
from deploy.errors import DeployError
from deploy.machine import cores, cpu_model

if TYPE_CHECKING:
    from numpy.typing import NDArray

# What the hint must be: int8 is in the file, and what is not quantised stays in float32. Left alone, OpenVINO takes
# bfloat16 on CPUs that have it.
_HINTS = {"fp32": "f32", "int8": "f32", "fp16": "f16", "bf16": "bf16"}
_PRECISIONS = {"f32": "fp32", "f16": "fp16", "bf16": "bf16", "u8": "int8", "i8": "int8", "float32": "fp32"}
_PRECISIONS |= {"float16": "fp16", "bfloat16": "bf16"}
_KINDS = {
    **dict.fromkeys(("Convolution", "GroupConvolution", "ConvolutionBackpropData", "Deconvolution"), CONVOLUTION),
    **dict.fromkeys(("MatMul", "FullyConnected"), PRODUCT),
}
_PASSING = ("Convert", "Subtract", "Multiply", "Reshape", "Transpose", "Unsqueeze", "Squeeze")  # of a dequantisation


class OpenVINO(Backend):
    """A compiled model on the CPU.

    `threads` compute together, by default as many as this process may use cores; `precision` is that of an ONNX file
    opened as it is (fp32, bf16, fp16; int8 where the file is), an engine has its own. Raises DeployError where the CPU
    would compute in another.
    """

    SUFFIX = ".blob"

    def __init__(self, file: Path, threads: int | None = None, precision: str | None = None) -> None:
        if threads is not None and threads < 1:
            raise DeployError(f"openvino: threads must be at least 1, given {threads}")
        if not file.is_file():
            raise DeployError(f"{file}: no such model file")
        openvino = _module()
        self._file, self._threads, self._version = file, threads or cores(), _version(openvino)
        if file.suffix == ".onnx":
            self._precision = precision or "fp32"
            model = _read(openvino, file)
            self._metadata = {METADATA_KEY: _contract(model, file)}
            self._compiled = _compile(openvino, model, self._precision, self._threads)
        else:
            described = sidecar.read(file, self.name())
            if problem := self.obstacle(described.made_for):
                raise DeployError(f"{file}: it cannot run here: {problem}; build one here: {described.command}")
            self._precision = str(described.settings["precision"])
            if precision not in (None, self._precision):
                raise DeployError(f"{file}: its precision is {self._precision}, asked for {precision}; build another")
            self._metadata = {METADATA_KEY: described.contract}
            config = _config(self._precision, self._threads)
            try:
                self._compiled = openvino.Core().import_model(file.read_bytes(), "CPU", config)
            except RuntimeError as error:
                raise DeployError(
                    f"{file}: OpenVINO {self._version} cannot load it on {cpu_model()} ({_short(error)}); "
                    f"build one here: {described.command}"
                ) from error
        self._contract = Contract.from_json(self._metadata[METADATA_KEY])
        self._request = self._compiled.create_infer_request()

    @classmethod
    def build(cls, onnx: Path, file: Path, precision: str = "fp32") -> dict[str, Any]:
        """Compiles for this machine's CPU, in fp32, bf16 or fp16, or in int8 where the ONNX is quantised.

        Raises DeployError where the ONNX is of another precision, or the CPU would compute in another.
        """
        if precision not in _HINTS:
            raise DeployError(f"openvino: unknown precision {precision!r}; choose one of {', '.join(_HINTS)}")
        openvino = _module()
        model = _read(openvino, onnx)
        contract = _contract(model, onnx)
        requested = _requested(model, precision)
        start = time.perf_counter()
        compiled = _compile(openvino, model, precision, cores())
        built = tuple(_built(operation) for operation in compiled.get_runtime_model().get_ordered_ops())
        taken = census.take(precision, requested, built)
        if not taken.verdict:
            raise DeployError(f"{onnx}: {taken.sentence}; export it with precision {precision}, or ask for what it is")
        return sidecar.publish(
            file,
            compiled.export_model().getvalue(),
            onnx,
            backend=cls.name(),
            contract=contract,
            made_for=cls.made_for(),
            settings={"precision": precision},
            census=taken,
            built_by={"seconds": time.perf_counter() - start, "cpu": cpu_model()},
        ).to_dict()

    @classmethod
    def made_for(cls, **settings: Any) -> dict[str, Any]:
        """The release, which must be the very same, and the architecture; OpenVINO itself checks the instruction set."""
        return {"versions": {"openvino": _version(_module())}, "architecture": platform.machine()}

    @classmethod
    def obstacle(cls, made_for: dict[str, Any]) -> str | None:
        """No OpenVINO, another release, another architecture."""
        try:
            version = _version(_module())
        except DeployError as error:
            return str(error)
        problems = []
        if (built_by := made_for.get("versions", {}).get("openvino", version)) != version:
            problems.append(f"it was built by OpenVINO {built_by}, here is {version}")
        if made_for.get("architecture", platform.machine()) != platform.machine():
            problems.append(f"it is for {made_for['architecture']}, this is {platform.machine()}")
        return "; ".join(problems) or None

    def infer(self, images_BHWC: NDArray[np.uint8]) -> Candidates:
        """Candidates of uint8 RGB images. Raises DeployError when their shape or type is not what the file takes."""
        spec = self._contract.image
        if images_BHWC.shape[1:] != (spec.height, spec.width, 3) or images_BHWC.dtype != np.uint8:
            raise DeployError(
                f"{self._file}: images must be uint8 of shape (B, {spec.height}, {spec.width}, 3), "
                f"given {images_BHWC.dtype} of shape {list(images_BHWC.shape)}"
            )
        found = self._request.infer({self._contract.input_name: images_BHWC}, share_inputs=True)
        boxes, scores, labels = (found[name] for name in self._contract.output_names)
        return Candidates(boxes, scores, labels.astype(np.int64, copy=False))

    def identity(self) -> dict[str, Any]:
        """Runtime, release, device, threads and precision, as OpenVINO says they are."""
        return {
            "runtime": "openvino",
            "version": self._version,
            "threads": int(self._compiled.get_property("INFERENCE_NUM_THREADS")),
            "device": cpu_model(),
            "precision": self._precision,
        }

    def metadata(self) -> dict[str, str]:
        """The contract, from the ONNX file or the sidecar."""
        return dict(self._metadata)

    def close(self) -> None:
        """Frees the model."""
        del self._request, self._compiled


def _module() -> Any:
    try:
        return importlib.import_module("openvino")
    except ImportError as error:
        raise DeployError(f"openvino: it is not installed ({error}); pip install 'headstart[openvino]'") from error


def _version(openvino: Any) -> str:
    """The release, as 2026.4.1, without the build."""
    return str(openvino.__version__).partition("-")[0]


def _read(openvino: Any, onnx: Path) -> Any:
    try:
        return openvino.Core().read_model(str(onnx))
    except RuntimeError as error:
        raise DeployError(f"{onnx}: OpenVINO {_version(openvino)} cannot read it ({_short(error)})") from error


def _contract(model: Any, onnx: Path) -> str:
    """The contract's JSON, from the ONNX file's metadata_props, which OpenVINO puts under `framework`."""
    if not model.has_rt_info(["framework", METADATA_KEY]):
        raise DeployError(f"{onnx}: the file carries no contract ({METADATA_KEY}); export it with Headstart")
    text = str(model.get_rt_info(["framework", METADATA_KEY]).astype(str))
    Contract.from_json(text)
    return text


def _config(precision: str, threads: int) -> dict[str, Any]:
    return {
        "INFERENCE_PRECISION_HINT": _HINTS[precision],
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
    }


def _compile(openvino: Any, model: Any, precision: str, threads: int) -> Any:
    if precision not in _HINTS:
        raise DeployError(f"openvino: unknown precision {precision!r}; choose one of {', '.join(_HINTS)}")
    compiled = openvino.Core().compile_model(model, "CPU", _config(precision, threads))
    used = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    if _PRECISIONS.get(used) != _PRECISIONS[_HINTS[precision]]:
        raise DeployError(f"openvino: {precision} was asked for, {cpu_model()} would compute in {used}; ask for fp32")
    return compiled


def _requested(model: Any, precision: str) -> tuple[Layer, ...]:
    """Each operation with the type of what it gives. A weighty one that reads what was quantised is int8, and one in
    float32 is asked for in the precision of the hint."""
    found = []
    for operation in model.get_ordered_ops():
        kind = _KINDS.get(operation.get_type_name(), operation.get_type_name())
        given = operation.outputs()
        kept = given[0].get_element_type().to_string() if given else "none"
        asked = _PRECISIONS.get(kept, kept)
        if operation.get_type_name() in _KINDS:
            if _reads_quantised(operation):
                asked = "int8"
            elif asked == "fp32":
                asked = _PRECISIONS[_HINTS[precision]]
        found.append(Layer(operation.get_friendly_name(), kind, asked))
    return tuple(found)


def _reads_quantised(operation: Any) -> bool:
    """Whether what it reads was quantised: a QuantizeLinear is a FakeQuantize here. Bytes alone tell nothing: the images
    are bytes too."""
    node = operation.input_value(0).get_node()
    while node.get_type_name() in _PASSING:
        node = node.input_value(0).get_node()
    return bool(node.get_type_name() == "FakeQuantize")


def _built(operation: Any) -> Layer:
    """A layer as the CPU plugin made it: what it says of its own precision."""
    told = operation.get_rt_info()
    kind, precision = (str(told[name].astype(str)) for name in ("layerType", "runtimePrecision"))
    return Layer(operation.get_friendly_name(), _KINDS.get(kind, kind), _PRECISIONS.get(precision, precision))


def _short(error: Exception) -> str:
    """The last line of what OpenVINO says; the first ones are places in its own code."""
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), "no reason was given")
