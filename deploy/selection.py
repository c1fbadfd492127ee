"""Which of a bundle's files runs on this device, and which of those is the fastest: `judge`, a function of the manifest
and of the device's facts alone. What was refused says why, and how to make a file that is not.

    models of release.json --ways--> (file, provider) --refusals--> the measured p50 decides --> Choice
                             Device ---------------------'
"""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from deploy.device import device as described
from deploy.errors import DeployError
from deploy.machine import cpu_model
from deploy.manifest import provider_of, runtime_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deploy.manifest import Model

# Backend to the package it imports and the extra that brings it.
_PACKAGES = {
    "onnxruntime": ("onnxruntime", "cpu"),
    "openvino": ("openvino", "openvino"),
    "tensorrt": ("tensorrt", "gpu"),
    "tensorrt_rtx": ("tensorrt_rtx", "tensorrt-rtx"),
}
_ON_GPU = ("tensorrt", "tensorrt_rtx", "cuda")  # backends and providers


@dataclass(frozen=True)
class Device:
    """What decides whether a file runs here. Versions are strings of numbers and points; None where there is none."""

    architecture: str
    cpu: str
    gpu: str | None = None
    compute_capability: str | None = None
    driver: str | None = None
    cuda: str | None = None  # the newest CUDA that the driver knows
    packages: dict[str, str] = field(default_factory=dict)  # installed runtime to its version
    providers: tuple[str, ...] = ()  # of ONNX Runtime, in short: cpu, cuda, ...
    backends: tuple[str, ...] = tuple(_PACKAGES)  # those this release has a file for


@dataclass(frozen=True)
class Verdict:
    """One way to run one file: why not, or how fast."""

    model: Model
    provider: str | None  # None is the backend's own default
    refused: tuple[str, ...]
    milliseconds: float | None = None  # p50 of one image end to end, the mean where there were too few calls for it
    measured_on: str | None = None
    here: bool = False  # whether that is a device like this one

    def sentence(self) -> str:
        """What speaks for it or against it, for people."""
        if self.refused:
            return "refused: " + "; ".join(self.refused)
        if self.milliseconds is None:
            return "runs here, never measured"
        return f"runs here, {self.milliseconds:.2f} ms on {'a device like this' if self.here else self.measured_on}"


def choose(models: Sequence[Model], device: Device, provider: str | None = None) -> Verdict:
    """The first of `judge`. Raises DeployError when none runs here, with every reason and what makes one that does."""
    verdicts = judge(models, device, provider)
    if verdicts and not verdicts[0].refused:
        return verdicts[0]
    reasons = "; ".join(f"{one.model.file}: {', '.join(one.refused)}" for one in verdicts)
    commands = list(dict.fromkeys(one.model.rebuild for one in verdicts if one.model.rebuild))
    mend = f"make one for this device: {' or '.join(commands)}" if commands else "release one for this device"
    raise DeployError(f"bundle: none of its files runs here ({reasons}); {mend}")


def judge(models: Sequence[Model], device: Device, provider: str | None = None) -> list[Verdict]:
    """Every way to run every model, those that run here first, the fastest of them at the top; with a provider of ONNX
    Runtime named, by that one alone.

    A time measured on a device like this one stands for a way if there is one, else the best measured elsewhere; what
    was never measured comes after what was, and equals keep the manifest's order. A measurement that was called
    unreliable counts only where there is no other.
    """
    verdicts = [_judged(model, way, device) for model in models for way in model.ways(provider)]
    never = float("inf")
    verdicts.sort(key=lambda one: (bool(one.refused), never if one.milliseconds is None else one.milliseconds))
    return verdicts


def refusals(model: Model, provider: str | None, device: Device) -> list[str]:
    """Why a file cannot run on a device; empty when nothing speaks against it."""
    if model.backend not in device.backends:
        return [f"this release has no backend {model.backend}; use a newer one"]
    made, reasons = model.made_for, []
    package, extra = _PACKAGES.get(model.backend, ("", ""))  # a backend of one's own answers for itself when it opens
    if package and package not in device.packages:
        reasons.append(f"{package} is not installed; pip install 'headstart[{extra}]'")
    elif model.backend == "onnxruntime" and provider is not None and provider not in device.providers:
        reasons.append(f"ONNX Runtime here has no provider {provider}, it has {', '.join(device.providers)}")
    elif provider in _ON_GPU and device.gpu is None:  # ONNX Runtime lists its providers with or without one
        reasons.append(f"provider {provider} needs an NVIDIA GPU, and there is none here")
    if made.get("architecture") not in (None, device.architecture):
        reasons.append(f"made for {made['architecture']} processors, this is {device.architecture}")
    if wanted := made.get("compute_capabilities"):
        if device.compute_capability is None:
            reasons.append(f"made for GPUs of compute capability {', '.join(wanted)}, and there is no NVIDIA GPU here")
        elif not any(_covers(one, device.compute_capability) for one in wanted):
            reasons.append(
                f"made for compute capability {', '.join(wanted)}, {device.gpu} here has {device.compute_capability}"
            )
    for name, version in made.get("versions", {}).items():
        found = device.packages.get(name)
        if found is not None and not _loads(version, found, bool(made.get("version_compatible"))):
            reasons.append(f"built by {name} {version}, installed is {found}")
    for name, found in (("driver", device.driver), ("cuda", device.cuda)):
        if (least := made.get(name)) is not None and (found is None or _numbers(found) < _numbers(least)):
            reasons.append(f"needs {name} {least} or newer, there is {found or 'none'}")
    return reasons


def this_device(models: Sequence[Model] = ()) -> Device:
    """The facts of the device this runs on, as far as these models ask for them: a device pays for every look."""
    from deploy.backend import names

    versioned = {name for model in models for name in model.made_for.get("versions", {})}
    known = {package for package, _ in _PACKAGES.values()} | versioned
    packages = {name: _version(name) if name in versioned else "" for name in known if find_spec(name) is not None}
    choosy = any(way is not None for model in models for way in model.ways())
    return Device(
        architecture=platform.machine(),
        cpu=cpu_model(),
        packages=packages,
        providers=_providers() if choosy and "onnxruntime" in packages else ("cpu",),
        backends=tuple(names()),
        **_nvidia(),
    )


def _judged(model: Model, provider: str | None, device: Device) -> Verdict:
    refused = tuple(refusals(model, provider, device))
    rows = [row for row in model.latency if provider_of(row) == provider and _milliseconds(row) is not None]
    rows = [row for row in rows if row.get("reliable")] or rows
    # A GPU's time is known by the GPU, a CPU's by the CPU.
    mine = device.gpu if provider in _ON_GPU or model.backend in _ON_GPU else device.cpu
    here = [row for row in rows if mine is not None and mine in _names_of(row)]
    best = min(here or rows, key=lambda row: _milliseconds(row) or 0.0, default=None)
    if best is None:
        return Verdict(model, provider, refused)
    measured_on = " / ".join(dict.fromkeys(name for name in _names_of(best) if name)) or "another device"
    return Verdict(model, provider, refused, _milliseconds(best), measured_on, bool(here))


def _milliseconds(row: dict[str, Any]) -> float | None:
    """Of one image; what a call of several took says little of it."""
    if row.get("batch", 1) != 1:
        return None
    timing = row.get("steps", {}).get("end_to_end", {})
    value = timing.get("p50") if timing.get("p50") is not None else timing.get("mean")
    return None if value is None else float(value)


def _names_of(row: dict[str, Any]) -> list[str]:
    return [str(name) for name in (runtime_of(row).get("device"), row.get("machine", {}).get("cpu")) if name]


def _covers(made_for: str, capability: str) -> bool:
    if made_for.endswith("+"):
        return _numbers(capability) >= _numbers(made_for[:-1])
    return _numbers(capability) == _numbers(made_for)


def _loads(built: str, installed: str, compatible: bool) -> bool:
    a, b = _numbers(built), _numbers(installed)
    if compatible:
        return a[:1] == b[:1] and b >= a
    length = min(len(a), len(b))  # 10.9 stands for every build of it
    return a[:length] == b[:length]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", str(version)))


def _version(package: str) -> str:
    """The version of an installed package, by its folder's metadata; distributions are named unlike their packages."""
    from importlib import metadata

    for name in metadata.packages_distributions().get(package, ()):
        return metadata.version(name)
    return ""


def _providers() -> tuple[str, ...]:
    try:
        import onnxruntime
    except ImportError:  # what is broken is told by the backend when it opens
        return ()
    return tuple(name.removesuffix("ExecutionProvider").lower() for name in onnxruntime.get_available_providers())


def _nvidia() -> dict[str, Any]:
    """Name, compute capability, driver and CUDA of the GPU that CUDA puts first; empty where there is none."""
    found = described()
    if not found["gpus"]:
        return {}
    first = found["gpus"][0]
    return {
        "gpu": first["name"],
        "compute_capability": first["compute_capability"],
        "driver": found["driver"],
        "cuda": found["cuda"],
    }
