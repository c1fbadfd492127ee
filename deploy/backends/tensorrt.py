"""TensorRT 10 and 11: an engine for the GPU and the release that it was built on."""

from __future__ import annotations

import hashlib
import importlib
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy import atomic, cuda, trt_network
from deploy.errors import DeployError
from deploy.trt_backend import TrtBackend, write

if TYPE_CHECKING:
    from collections.abc import Sequence

_MAJORS = ("10", "11")


class TensorRT(TrtBackend):
    """One engine for one kind of GPU. See `TrtBackend`."""

    @staticmethod
    def module() -> Any:
        """`tensorrt`, of a release that this code is for."""
        try:
            trt = importlib.import_module("tensorrt")
        except ImportError as error:
            raise DeployError(
                f"tensorrt: it is not installed ({error}); pip install 'headstart[gpu]', on a Jetson take JetPack's"
            ) from error
        if str(trt.__version__).partition(".")[0] not in _MAJORS:
            raise DeployError(f"tensorrt: this is for releases {' and '.join(_MAJORS)}, here is {trt.__version__}")
        return trt

    @classmethod
    def build(
        cls,
        onnx: Path,
        file: Path,
        precision: str = "fp32",
        batch: Sequence[int] = (1, 1, 8),
        workspace_mb: int | None = None,
        optimization_level: int | None = None,
        timing_cache: str | None = None,
    ) -> dict[str, Any]:
        """Builds for this machine's GPU.

        `precision` is what the ONNX file must be; `batch` the least, best and most images; `workspace_mb` what a layer
        may use; `optimization_level` from 0 to 5, more for longer builds; `timing_cache` a folder that keeps what was
        timed, so that the next build is quick and chooses alike. Raises DeployError where the ONNX is of another
        precision, is quantised to uint8, or cannot be built.
        """
        trt = cls.module()
        made_for = cls.made_for()
        network = trt_network.parse(trt, onnx)
        trt_network.verdict(precision, network.layers(), onnx)
        config = trt_network.configure(trt, network, workspace_mb)
        if optimization_level is not None:
            config.builder_optimization_level = optimization_level
        cache = _Timings(trt, config, made_for, timing_cache) if timing_cache else None
        settings = {
            "precision": precision,
            "batch": list(batch),
            "workspace_mb": workspace_mb,
            "optimization_level": optimization_level,
            "timing_cache": timing_cache,
        }
        described = write(trt, network, config, onnx, file, backend=cls.name(), made_for=made_for, settings=settings)
        if cache:
            described.built_by["timing_cache"] = {"before": cache.sha256, "after": cache.keep()}
            described.write(file)
        return described.to_dict()

    @classmethod
    def made_for(cls, **settings: Any) -> dict[str, Any]:
        """The release, which must be the very same, and the GPU of this machine."""
        found = cuda.describe()
        return {
            "versions": {"tensorrt": str(cls.module().__version__)},
            "compute_capabilities": [found["compute_capability"]],
            "architecture": platform.machine(),
            "device": found["device"],
        }


class _Timings:
    """What TensorRT timed on one GPU with one release: a file of its own for each, since it is worth nothing to
    others."""

    def __init__(self, trt: Any, config: Any, made_for: dict[str, Any], folder: str) -> None:
        self._config = config
        name = f"{made_for['versions']['tensorrt']}-{made_for['device']}-{made_for['compute_capabilities'][0]}"
        self._file = Path(folder) / f"{name.replace(' ', '-')}.timing"
        content = self._file.read_bytes() if self._file.is_file() else b""
        self.sha256 = hashlib.sha256(content).hexdigest() if content else None
        self._cache = config.create_timing_cache(content)
        if not config.set_timing_cache(self._cache, ignore_mismatch=False):
            raise DeployError(f"{self._file}: TensorRT does not take this timing cache; remove the file")

    def keep(self) -> str:
        """Writes what is known now, as a whole or not at all; its sha256."""
        content = bytes(self._config.get_timing_cache().serialize())
        self._file.parent.mkdir(parents=True, exist_ok=True)
        atomic.write(self._file, content)
        return hashlib.sha256(content).hexdigest()
