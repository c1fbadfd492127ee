"""ONNX Runtime: the reference backend, on the CPU, CUDA, TensorRT or OpenVINO. Any ONNX file with a contract runs as it
is."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deploy.backend import Backend, Candidates
from deploy.contract import METADATA_KEY, Contract
from deploy.errors import DeployError
from deploy.machine import cores, cpu_model

if TYPE_CHECKING:
    from numpy.typing import NDArray

_ON_GPU = ("cuda", "tensorrt")
_PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
}
_PACKAGE = {"cuda": "'headstart[gpu]'", "tensorrt": "'headstart[gpu]'", "openvino": "onnxruntime-openvino"}
# OpenVINO computes in bf16 on some CPUs unless it is told not to.
_OPTIONS = {"openvino": {"device_type": "CPU", "precision": "FP32"}}
_SMALL = 4096  # bytes that a node may give on another provider: arithmetic on shapes, which belongs on the CPU
# They all install the same `onnxruntime` folder, and the last one installed wins without a word.
_DISTRIBUTIONS = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-openvino",
    "onnxruntime-directml",
    "onnxruntime-migraphx",
    "onnxruntime-rocm",
    "onnxruntime-qnn",
    "onnxruntime-training",
)


class OnnxRuntime(Backend):
    """An ONNX Runtime session.

    `provider` is cpu, cuda, tensorrt or openvino and is the one really used, by every node that gives more than a few
    numbers, or DeployError says why not; `threads` work inside an operator, by default as many as this process may use
    cores. Raises DeployError when two distributions of ONNX Runtime shadow each other.
    """

    def __init__(self, file: Path, provider: str = "cpu", threads: int | None = None) -> None:
        if provider not in _PROVIDERS:
            raise DeployError(f"onnxruntime: unknown provider {provider!r}; choose one of {', '.join(_PROVIDERS)}")
        if threads is not None and threads < 1:
            raise DeployError(f"onnxruntime: threads must be at least 1, given {threads}")
        if not file.is_file():
            raise DeployError(f"{file}: no such model file")
        package = find_spec("onnxruntime")
        if package is None or package.origin is None:
            raise DeployError("onnxruntime: it is not installed; pip install 'headstart[cpu]' (or [gpu])")
        refuse_shadowed(installed(Path(package.origin).parent.parent))
        try:
            import onnxruntime
        except ImportError as error:
            raise DeployError(f"onnxruntime: it cannot be loaded ({error}); reinstall it for this Python") from error
        self._provider, self._threads, self._version = provider, threads or cores(), onnxruntime.__version__
        if _PROVIDERS[provider] not in onnxruntime.get_available_providers():
            raise DeployError(
                f"onnxruntime: provider {provider} is not in this build, which has "
                f"{', '.join(onnxruntime.get_available_providers())}; pip uninstall -y onnxruntime && "
                f"pip install {_PACKAGE[provider]}, or choose the provider cpu"
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        # A session that is given the CPU alone has nothing to fall back to.
        folder = None
        if provider != "cpu":
            import tempfile

            folder = tempfile.TemporaryDirectory()
            options.enable_profiling, options.profile_file_prefix = True, f"{folder.name}/profile"
        options.log_severity_level = 3  # errors; a fallback, which ONNX Runtime only warns of, is caught below
        try:
            self._session = onnxruntime.InferenceSession(
                str(file),
                options,
                providers=[_PROVIDERS[provider]],
                provider_options=[_OPTIONS.get(provider, {})],
            )
        except Exception as error:  # its exceptions have no common class of their own
            raise DeployError(f"{file}: ONNX Runtime {self._version} cannot open the file ({error})") from error
        check_provider(_PROVIDERS[provider], self._session.get_providers())
        self._file = file
        self._input_name, self._output_names = self._names()
        self._input_shape = self._session.get_inputs()[0].shape
        self._nodes = self._assigned() if folder else {}

    def infer(self, images_BHWC: NDArray[np.uint8]) -> Candidates:
        """Candidates of uint8 RGB images. Raises DeployError when their shape or type is not what the file takes."""
        fits = len(self._input_shape) == images_BHWC.ndim and all(
            given == wanted
            for given, wanted in zip(images_BHWC.shape, self._input_shape, strict=True)
            if isinstance(wanted, int)
        )
        if not fits or images_BHWC.dtype != np.uint8:
            raise DeployError(
                f"{self._file}: images must be uint8 of shape {self._input_shape}, "
                f"given {images_BHWC.dtype} of shape {list(images_BHWC.shape)}"
            )
        boxes, scores, labels = self._session.run(self._output_names, {self._input_name: images_BHWC})
        return Candidates(boxes, scores, labels.astype(np.int64, copy=False))

    def identity(self) -> dict[str, Any]:
        """Runtime, its version, the provider really used, threads, device; the precision is that of the file's
        operators.
        """
        return {
            "runtime": "onnxruntime",
            "version": self._version,
            "provider": self._session.get_providers()[0],
            "threads": self._threads,
            **_device(self._provider),
            "precision": "of the file",
            **({"nodes": self._nodes} if self._nodes else {}),
        }

    def metadata(self) -> dict[str, str]:
        """The ONNX file's metadata_props."""
        return dict(self._session.get_modelmeta().custom_metadata_map)

    def close(self) -> None:
        """Frees the session."""
        del self._session

    def _assigned(self) -> dict[str, int]:
        """How many nodes ran on each provider, of one image; DeployError where one that matters ran elsewhere."""
        shape = [size if isinstance(size, int) else 1 for size in self._input_shape]
        self.infer(np.zeros(shape, np.uint8))
        profile = json.loads(Path(self._session.end_profiling()).read_text(encoding="utf-8"))
        return check_nodes(_PROVIDERS[self._provider], profile)

    def _names(self) -> tuple[str, list[str]]:
        inputs = [one.name for one in self._session.get_inputs()]
        outputs = [one.name for one in self._session.get_outputs()]
        if METADATA_KEY in (metadata := self.metadata()):
            contract = Contract.from_json(metadata[METADATA_KEY])
            name, wanted = contract.input_name, list(contract.output_names)
        else:
            name, wanted = "images", ["boxes", "scores", "labels"]
        if inputs != [name] or not set(wanted) <= set(outputs):
            raise DeployError(
                f"{self._file}: the graph must take {name} and give {', '.join(wanted)}; "
                f"it takes {', '.join(inputs)} and gives {', '.join(outputs)}"
            )
        return name, wanted


def _device(provider: str) -> dict[str, Any]:
    if provider not in _ON_GPU:
        return {"device": cpu_model()}
    from deploy import cuda

    return cuda.describe()


def check_nodes(wanted: str, events: list[dict[str, Any]]) -> dict[str, int]:
    """How many nodes ran on each provider, from a session's profile.

    Raises DeployError where none ran on the one wanted, or one that gives more than a few numbers ran on another.
    """
    ran = {event["name"]: event["args"] for event in events if event.get("args", {}).get("provider")}
    counts: dict[str, int] = {}
    for args in ran.values():
        counts[args["provider"]] = counts.get(args["provider"], 0) + 1
    elsewhere = [
        f"{args['op_name']} on {args['provider']}"
        for args in ran.values()
        if args["provider"] != wanted and int(args["output_size"]) > _SMALL
    ]
    if elsewhere or wanted not in counts:
        raise DeployError(
            f"onnxruntime: {wanted} was asked for and {len(elsewhere) or 'all'} nodes that matter run elsewhere: "
            f"{', '.join(elsewhere[:5]) or counts}; choose the provider cpu, or export the model for this one"
        )
    return counts


def installed(folder: Path) -> list[str]:
    """The distributions of ONNX Runtime in a folder of installed packages."""
    # By their folders: importlib.metadata would tell as much and costs a device 20 ms, a tenth of its start.
    found = {file.name.partition("-")[0].lower().replace("_", "-") for file in folder.glob("onnxruntime*.dist-info")}
    return [name for name in _DISTRIBUTIONS if name in found]


def refuse_shadowed(distributions: list[str]) -> None:
    """Raises DeployError when more than one distribution of ONNX Runtime is installed."""
    if len(distributions) > 1:
        raise DeployError(
            f"onnxruntime: {' and '.join(distributions)} are installed together and overwrite each other; "
            f"pip uninstall -y {' '.join(distributions)}, then install the one you want"
        )


def check_provider(wanted: str, active: list[str]) -> None:
    """Raises DeployError when the session does not run on the provider that was asked for."""
    if not active or active[0] != wanted:
        raise DeployError(
            f"onnxruntime: {wanted} was asked for, the session runs on {', '.join(active) or 'none'}; "
            "check the driver and the CUDA libraries, or choose the provider cpu"
        )
