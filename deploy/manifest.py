"""Manifest: what release.json says of the models in a bundle, and how what older releases wrote is read.

    {"schema_version": 2, "name", "created", "licence", "provenance", "files": {path: {sha256, size}}, "classes",
     "models": [{file, sha256, backend, precision, contract, made_for, accuracy, latency, rebuild}],
     "sample": null | {image, original, content, start, detections: {model file: path}, tensors: {tensor: path}}}

The first model is the reference: the others were made from it or from what it was made from, and are for other devices.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from deploy.contract import Contract
from deploy.errors import DeployError

SCHEMA_VERSION = 2
_FIRST_MODEL = "model.onnx"  # the one name that schema 1 knew
# What must not differ between the files of a bundle: a program would behave differently from device to device.
_SHARED = ("image", "classes", "category_ids", "score_threshold", "max_detections")


@dataclass(frozen=True)
class Model:
    """One file of a bundle, where it runs, and what was measured on it.

    `made_for` says what it needs of a device, and is empty for a file that runs anywhere its backend does:
    `compute_capabilities` (such as ["8.6", "12.0+"], "+" for this and newer ones), `architecture` (of the CPU, as
    platform.machine() has it), `versions` (package to the version that built it; loaded by the same one alone),
    `version_compatible` (loaded by later releases of that major version too), `driver` and `cuda` (the oldest that
    will do). `latency` holds the measurements, one a machine, of `deploy benchmark` or of the stage of that name.
    """

    file: str
    sha256: str
    backend: str
    precision: str
    contract: Contract
    made_for: dict[str, Any] = field(default_factory=dict)
    accuracy: dict[str, Any] | None = None
    latency: tuple[dict[str, Any], ...] = ()
    rebuild: str = ""  # the command that makes such a file for another device

    def ways(self, provider: str | None = None) -> list[str | None]:
        """The providers of ONNX Runtime to run it by: its own default, which is None, and every other that it was
        measured on; or the one asked for."""
        if provider is not None:
            return [None if provider == "cpu" else provider]
        return [None, *sorted({name for row in self.latency if (name := provider_of(row)) is not None})]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"contract": json.loads(self.contract.to_json()), "latency": list(self.latency)}

    @classmethod
    def from_dict(cls, values: Any) -> Model:
        """The inverse of `to_dict`. Raises DeployError on fields that are unknown, missing or of the wrong type."""
        if not isinstance(values, dict):
            raise DeployError(f"model: an object is wanted, given {values!r}")
        problems = [f"unknown field {name!r}" for name in sorted(set(values) - set(_KINDS))]
        problems += [f"missing field {name!r}" for name in sorted(set(_KINDS) - set(values))]
        problems += [
            f"{name} is {values[name]!r}"
            for name, kinds in _KINDS.items()
            if name in values and not isinstance(values[name], kinds)
        ]
        if not problems:
            problems = _shape_problems(values)
        if problems:
            raise DeployError(f"model {values.get('file')!r}: " + "; ".join(problems))
        contract = Contract.from_json(json.dumps(values["contract"]))
        return cls(**(values | {"contract": contract, "latency": tuple(values["latency"])}))


_KINDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("file", "sha256", "backend", "precision", "rebuild"), str),
    **dict.fromkeys(("contract", "made_for"), dict),
    "accuracy": (dict, type(None)),
    "latency": list,
}
_MADE_FOR: dict[str, type] = {
    **dict.fromkeys(("architecture", "driver", "cuda"), str),
    "compute_capabilities": list,
    "versions": dict,
    "version_compatible": bool,
}
_FIELDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("name", "provenance", "licence"), object),
    "schema_version": int,
    "created": str,
    "files": dict,
    "classes": list,
    "models": list,
    "sample": (dict, type(None)),
}


def provider_of(row: dict[str, Any]) -> str | None:
    """The provider of ONNX Runtime on which a latency was measured; None for the CPU's, which is the default, and for
    other runtimes."""
    name = str(runtime_of(row).get("provider", "")).removesuffix("ExecutionProvider").lower()
    return None if name in ("", "cpu") else name


def runtime_of(row: dict[str, Any]) -> dict[str, Any]:
    """What the backend said of itself: `runtime` in the rows of the benchmark stage, `backend` in `deploy benchmark`'s."""
    found = row.get("runtime") or row.get("backend")
    return found if isinstance(found, dict) else {}


def upgraded(release: Any, where: str) -> dict[str, Any]:
    """A manifest of any known schema as one of this schema; DeployError for an unknown one or fields that lack."""
    version = release.get("schema_version") if isinstance(release, dict) else None
    if version == 1:
        release = _from_1(release, where)
    elif version != SCHEMA_VERSION:
        raise DeployError(
            f"{where}: schema_version {version!r} is none of 1, {SCHEMA_VERSION}; "
            "use the release of Headstart that wrote it"
        )
    problems = [f"{name} is missing" for name in _FIELDS if name not in release]
    problems += [
        f"{name} is {release[name]!r}"
        for name, kind in _FIELDS.items()
        if name in release and not isinstance(release[name], kind)
    ]
    sample = release.get("sample")
    if isinstance(sample, dict) and not all(isinstance(sample.get(one), dict) for one in ("detections", "tensors")):
        problems.append("the sample's detections and tensors are no objects")
    if problems:
        raise DeployError(f"{where}: " + "; ".join(problems) + "; copy the bundle again from where it was released")
    return dict(release)


def models_of(release: dict[str, Any], where: str) -> tuple[Model, ...]:
    """The models of a manifest. DeployError when there is none, two are one, or they do not belong together."""
    models = tuple(Model.from_dict(values) for values in release["models"])
    problems = problems_of(models)
    if models and list(models[0].contract.classes) != release["classes"]:
        problems.append("classes are not those of its contracts")
    problems += [
        f"{model.file} has another hash among the models than among the files"
        for model in models
        if release["files"].get(model.file, {}).get("sha256") != model.sha256
    ]
    if problems:
        raise DeployError(f"{where}: " + "; ".join(problems) + "; copy the bundle again from where it was released")
    return models


def problems_of(models: tuple[Model, ...]) -> list[str]:
    """Why these models are no bundle: none, equal names, or contracts that a program would feel."""
    problems = [] if models else ["it holds no model"]
    names = [model.file for model in models]
    problems += [f"{name} is listed twice" for name in sorted({name for name in names if names.count(name) > 1})]
    problems += [
        f"{model.file} and {models[0].file} differ in {name}"
        for model in models[1:]
        for name in _SHARED
        if getattr(model.contract, name) != getattr(models[0].contract, name)
    ]
    return problems


def _shape_problems(values: dict[str, Any]) -> list[str]:
    """What in `made_for` and `latency` is not as selection reads it; other keys of `made_for` are notes for people."""
    problems = [
        f"made_for.{name} is {values['made_for'][name]!r}"
        for name, kind in _MADE_FOR.items()
        if name in values["made_for"] and not isinstance(values["made_for"][name], kind)
    ]
    if not all(isinstance(row, dict) for row in values["latency"]):
        problems.append("a row of latency is no object")
    return problems


def _from_1(release: dict[str, Any], where: str) -> dict[str, Any]:
    """Schema 1 had one model, whose contract, accuracy and latency stood at the top."""
    old = dict(release)
    try:
        digest = old["files"][_FIRST_MODEL]["sha256"]
        contract, accuracy, latency = old.pop("contract"), old.pop("accuracy"), old.pop("latency")
    except (KeyError, TypeError) as error:
        raise DeployError(f"{where}: {error} is missing; copy the bundle again from where it was released") from error
    model = {
        "file": _FIRST_MODEL,
        "sha256": digest,
        "backend": "onnxruntime",
        "precision": "fp32",  # no other was made in its time
        "contract": contract,
        "made_for": {},
        "accuracy": accuracy,
        "latency": [latency] if latency else [],
        "rebuild": "",
    }
    sample = old.get("sample")
    if sample:
        sample = {**sample, "detections": {_FIRST_MODEL: sample.get("detections")}, "tensors": {}}
    return old | {"schema_version": SCHEMA_VERSION, "models": [model], "sample": sample}
