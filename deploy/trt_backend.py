"""What the backends of TensorRT and TensorRT-RTX share: everything but which module it is and how an engine is built."""

from __future__ import annotations

import platform
import time
from abc import abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy import census, cuda, sidecar, trt_network
from deploy.backend import Backend, Candidates
from deploy.contract import METADATA_KEY
from deploy.errors import DeployError
from deploy.trt_session import Session

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from deploy.sidecar import Sidecar
    from deploy.trt_network import Network


class TrtBackend(Backend):
    """An engine on the first CUDA device; `cuda_graph` replays captured work, which small networks need.

    Raises DeployError where there is no GPU, or the engine is for another one or another release.
    """

    SUFFIX = ".engine"

    def __init__(self, file: Path, cuda_graph: bool = False) -> None:
        self._sidecar = sidecar.read(file, self.name())
        if problem := self.obstacle(self._sidecar.made_for):
            raise DeployError(f"{file}: it cannot run here: {problem}; build one here: {self._sidecar.command}")
        trt, self._device = self.module(), cuda.describe()
        self._version = str(trt.__version__)
        self._session = Session(trt, file, self._sidecar, cuda.Cuda(), cuda_graph)

    @staticmethod
    @abstractmethod
    def module() -> Any:
        """The Python module. Raises DeployError where it is not installed."""

    @classmethod
    def obstacle(cls, made_for: dict[str, Any]) -> str | None:
        """No such module, no GPU, another GPU, another release."""
        try:
            version, device = str(cls.module().__version__), cuda.describe()
        except DeployError as error:
            return str(error)
        problems = []
        wanted, found = made_for.get("compute_capabilities"), device["compute_capability"]
        if wanted and found not in wanted:
            problems.append(f"it is for compute capability {', '.join(wanted)}, {device['device']} has {found}")
        built_by = made_for.get("versions", {}).get(cls.name(), version)
        if built_by != version:
            problems.append(f"it was built by {cls.name()} {built_by}, here is {version}")
        if made_for.get("architecture", platform.machine()) != platform.machine():
            problems.append(f"it is for {made_for['architecture']}, this is {platform.machine()}")
        return "; ".join(problems) or None

    def infer(self, images_BHWC: NDArray[np.uint8]) -> Candidates:
        """Candidates of uint8 RGB images. Raises DeployError when their shape, type or number is not the engine's."""
        return self._session.infer(images_BHWC)

    def identity(self) -> dict[str, Any]:
        """Runtime, release, GPU by CUDA's own numbering, driver, the precision asked for."""
        return {
            "runtime": self.name(),
            "version": self._version,
            **self._device,
            "precision": self._sidecar.settings["precision"],
        }

    def metadata(self) -> dict[str, str]:
        """The contract, from the sidecar."""
        return {METADATA_KEY: self._sidecar.contract}

    def close(self) -> None:
        """Frees the engine and the device."""
        self._session.close()


def write(
    trt: Any,
    network: Network,
    config: Any,
    onnx: Path,
    engine: Path,
    *,
    backend: str,
    made_for: dict[str, Any],
    settings: dict[str, Any],
) -> Sidecar:
    """Builds and writes an engine with its sidecar. What was built is read back where the GPU at hand is one that the
    engine is for. Raises DeployError where it cannot be built, or was not built as asked; then there is no file."""
    start = time.perf_counter()
    content = trt_network.serialise(trt, network, config, settings["batch"])
    asked, layers = settings["precision"], network.layers()
    described = sidecar.publish(
        engine,
        content,
        onnx,
        backend=backend,
        contract=network.contract_json,
        made_for=made_for,
        settings=settings,
        census=census.take(asked, layers, None),
        built_by={"seconds": time.perf_counter() - start, "warnings": network.log.warnings()},
    )
    if cuda.obstacle() or cuda.describe()["compute_capability"] not in made_for["compute_capabilities"]:
        return described
    try:
        session = Session(trt, engine, described, cuda.Cuda())
        try:
            taken = census.take(asked, layers, session.layers(trt))
        finally:
            session.close()
        if not taken.verdict:
            raise DeployError(f"{onnx}: the engine is not what was asked for: {taken.sentence}")
    except BaseException:
        sidecar.remove(engine)
        raise
    described = replace(described, census=taken.to_dict())
    described.write(engine)
    return described
