"""TensorRT-RTX: engines for several GPUs at once, built on a machine without any; run where a supported one is."""

from __future__ import annotations

import importlib
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy import cuda, trt_network
from deploy.errors import DeployError
from deploy.trt_backend import TrtBackend, write

if TYPE_CHECKING:
    from collections.abc import Sequence


class TensorRTRTX(TrtBackend):
    """One engine for any of the GPUs it was built for. See `TrtBackend`."""

    @staticmethod
    def module() -> Any:
        """`tensorrt_rtx`."""
        try:
            return importlib.import_module("tensorrt_rtx")
        except ImportError as error:
            raise DeployError(
                f"tensorrt_rtx: it is not installed ({error}); pip install 'headstart[tensorrt-rtx]'"
            ) from error

    @classmethod
    def build(
        cls,
        onnx: Path,
        file: Path,
        precision: str = "fp32",
        batch: Sequence[int] = (1, 1, 8),
        compute_capabilities: Sequence[str] = (),
        workspace_mb: int | None = None,
    ) -> dict[str, Any]:
        """Builds for the compute capabilities given, such as `8.6`, or else for this machine's GPU.

        `precision` is what the ONNX file must be; `batch` the least, best and most images; `workspace_mb` what a layer
        may use. Raises DeployError where the ONNX is of another precision, is quantised to uint8, or cannot be built.
        """
        trt = cls.module()
        made_for = cls.made_for(compute_capabilities=compute_capabilities)
        network = trt_network.parse(trt, onnx)
        if network.contract.nms == "graph":
            raise DeployError(f"{onnx}: tensorrt_rtx has nothing that does its NMS; export the model with nms: host")
        trt_network.verdict(precision, network.layers(), onnx)
        config = trt_network.configure(trt, network, workspace_mb)
        targets = [_target(trt, one) for one in made_for["compute_capabilities"]]
        config.num_compute_capabilities = len(targets)
        for index, target in enumerate(targets):
            config.set_compute_capability(target, index)
        settings = {
            "precision": precision,
            "batch": list(batch),
            "compute_capabilities": made_for["compute_capabilities"],
            "workspace_mb": workspace_mb,
        }
        return write(
            trt, network, config, onnx, file, backend=cls.name(), made_for=made_for, settings=settings
        ).to_dict()

    @classmethod
    def made_for(cls, compute_capabilities: Sequence[str] = (), **settings: Any) -> dict[str, Any]:
        """The release, which must be the very same, and the compute capabilities: those given, or this GPU's."""
        trt = cls.module()
        if isinstance(compute_capabilities, str | float):
            raise DeployError(
                f'tensorrt_rtx: compute_capabilities is a list, as ["8.6"], given {compute_capabilities!r}'
            )
        capabilities = [str(one) for one in compute_capabilities]
        if not capabilities:
            try:
                capabilities = [cuda.describe()["compute_capability"]]
            except DeployError as error:
                raise DeployError(
                    f'tensorrt_rtx: for which GPUs? None is here ({error}); name them: compute_capabilities=["8.6"]'
                ) from error
        for one in capabilities:
            _target(trt, one)
        return {
            "versions": {"tensorrt_rtx": str(trt.__version__)},
            "compute_capabilities": capabilities,
            "architecture": platform.machine(),
        }


def _target(trt: Any, capability: str) -> Any:
    """The member of TensorRT-RTX's enumeration, as SM86 for `8.6`. Raises DeployError where it has none."""
    found = getattr(trt.ComputeCapability, f"SM{str(capability).replace('.', '')}", None)
    if found is None:
        known = [f"{name[2:-1]}.{name[-1]}" for name in trt.ComputeCapability.__members__ if name.startswith("SM")]
        raise DeployError(
            f"tensorrt_rtx {trt.__version__}: it builds nothing for compute capability {capability}; it knows "
            f"{', '.join(known)}; build with tensorrt on the device itself"
        )
    return found
