"""Bundle: the folder that ships. A model, what is known of it, and hashes that show a change.

README.md                 the model card, as the Hugging Face hub reads it
model.onnx                the model, with its contract inside
release.json              files and their sha256, contract, classes, accuracy, latency, provenance, licence
sample/image.jpg          (if wanted) an image, and sample/detections.json: what the model finds in it
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from deploy.contract import Contract
from deploy.detections import Detections
from deploy.errors import DeployError

if TYPE_CHECKING:
    from deploy.parity import Tolerance

SCHEMA_VERSION = 1
MANIFEST = "release.json"
MODEL = "model.onnx"
_GIVEN = ("name", "accuracy", "latency", "provenance", "licence")  # by whoever releases
_FIELDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(_GIVEN, object),
    "schema_version": int,
    "created": str,
    "files": dict,
    "contract": dict,
    "classes": list,
    "sample": (dict, type(None)),
}


@dataclass(frozen=True)
class Check:
    """One line of `verify`; `passed` is None where there was nothing to check."""

    name: str
    passed: bool | None
    detail: str


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its folder, its contract and all of release.json."""

    path: Path
    contract: Contract
    release: dict[str, Any]

    @property
    def model(self) -> Path:
        """The model file."""
        return self.path / MODEL

    @property
    def sample(self) -> tuple[Path, Detections] | None:
        """The sample image and what should be found in it at the contract's threshold; None when there is none."""
        if self.release["sample"] is None:
            return None
        rows = _read_json(self.path / self.release["sample"]["detections"])
        return self.path / self.release["sample"]["image"], Detections.from_list(rows)

    @classmethod
    def open(cls, path: Path | str) -> Bundle:
        """Opens a bundle after checking that it is whole.

        Raises DeployError naming what is missing, changed or unknown to this release.
        """
        path = Path(path)
        release = _read_json(path / MANIFEST)
        version = release.get("schema_version") if isinstance(release, dict) else None
        if version != SCHEMA_VERSION:
            raise DeployError(
                f"{path / MANIFEST}: schema_version {version!r} is not {SCHEMA_VERSION}; "
                "use the release of Headstart that wrote it"
            )
        problems = [f"{name} is missing" for name in _FIELDS if name not in release]
        problems += [
            f"{name} is {release[name]!r}"
            for name, kind in _FIELDS.items()
            if name in release and not isinstance(release[name], kind)
        ]
        if not problems:
            problems = _file_problems(path, release)
        if problems:
            raise DeployError(f"{path}: " + "; ".join(problems) + "; copy the bundle again from where it was released")
        contract = Contract.from_json(json.dumps(release["contract"]))
        if list(contract.classes) != release["classes"]:
            raise DeployError(f"{path / MANIFEST}: classes are not those of its contract; copy the bundle again")
        return cls(path, contract, release)


def write(
    directory: Path,
    model: Path,
    contract: Contract,
    release: dict[str, Any],
    card: str,
    sample: tuple[Path, Detections] | None = None,
) -> Bundle:
    """Writes a bundle, which appears whole or not at all, and opens it.

    `release` has name, accuracy, latency, provenance and licence; `card` is the model card; `sample` an image file and
    what the model finds in it at the contract's threshold, at least one detection. Raises DeployError when the folder
    exists or something lacks.
    """
    directory = Path(directory)
    problems = [f"{name} is missing" for name in _GIVEN if name not in release]
    problems += [f"{name!r} is unknown" for name in release if name not in _GIVEN]
    if sample is not None and not len(sample[1]):
        problems.append("a sample without detections proves nothing; choose another image or none")
    if directory.exists():
        problems.append("the folder exists; choose another or remove it")
    if problems:
        raise DeployError(f"{directory}: " + "; ".join(problems))
    from datetime import datetime, timezone

    partial = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        shutil.copyfile(model, partial / MODEL)
        (partial / "README.md").write_text(card, encoding="utf-8")
        names = [MODEL, "README.md"]
        described = None
        if sample is not None:
            described = _write_sample(partial, sample, contract)
            names += described.values()
        manifest = release | {
            "schema_version": SCHEMA_VERSION,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "files": {name: _digest(partial / name) for name in names},
            "contract": json.loads(contract.to_json()),
            "classes": list(contract.classes),
            "sample": described,
        }
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for file in partial.rglob("*"):
            _sync(file)
        _sync(partial)
        partial.rename(directory)
        _sync(directory.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return Bundle.open(directory)


def verify(path: Path | str, tolerance: Tolerance | None = None, **settings: Any) -> list[Check]:
    """Whether a bundle is whole and its model does here what it did where it was released.

    The tolerance, by default that of float32, is in pixels of the network's input, so that a large sample image does
    not loosen or tighten it. `settings` are the backend's.
    """
    try:
        bundle = Bundle.open(path)
    except DeployError as error:
        return [Check("files", False, str(error))]
    from deploy.parity import FLOAT32, compare
    from deploy.predictor import Predictor

    checks = [Check("files", True, f"{len(bundle.release['files'])} files have the sizes and hashes of {MANIFEST}")]
    try:
        predictor = Predictor.open(bundle.path, **settings)
    except DeployError as error:
        return [*checks, Check("model", False, str(error))]
    with predictor:
        runtime = predictor.backend.identity()
        opened = f"opens on {runtime['runtime']} {runtime['version']}, its contract is that of {MANIFEST}"
        checks.append(Check("model", True, opened))
        if bundle.sample is None:
            return [*checks, Check("sample", None, "the bundle has no sample")]
        image, expected = bundle.sample
        upright = predictor.decode(image)
        _, placement = bundle.contract.image.prepare(upright)
        scale = max(a / b for a, b in zip(placement.original, placement.content, strict=True))
        allowed = tolerance or FLOAT32
        scaled = replace(allowed, box_px=allowed.box_px * scale)
        found = predictor([upright])
    contract = bundle.contract
    parity = compare([expected], found, scaled, contract.score_threshold, contract.max_detections)
    return [*checks, Check("sample", parity.verdict, parity.sentence)]


def _write_sample(partial: Path, sample: tuple[Path, Detections], contract: Contract) -> dict[str, str]:
    image, detections = sample
    described = {"image": f"sample/image{image.suffix.lower()}", "detections": "sample/detections.json"}
    (partial / "sample").mkdir()
    shutil.copyfile(image, partial / described["image"])
    rows = json.dumps(detections.to_list(contract.classes), indent=2)
    (partial / described["detections"]).write_text(rows + "\n", encoding="utf-8")
    return described


def _file_problems(path: Path, release: dict[str, Any]) -> list[str]:
    problems = [f"{MANIFEST} does not list {MODEL}"] if MODEL not in release["files"] else []
    sample = release["sample"]
    if sample is not None and not {sample.get("image"), sample.get("detections")} <= set(release["files"]):
        problems.append(f"{MANIFEST} does not list the files of the sample")
    for name, wanted in release["files"].items():
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            problems.append(f"{name} lies outside the bundle")
        elif not (path / name).is_file():
            problems.append(f"{name} is missing")
        elif _digest(path / name) != wanted:
            problems.append(f"{name} was changed after the release")
    return problems


def _digest(file: Path) -> dict[str, Any]:
    # Read in pieces: a device may have less memory to spare than the model has bytes.
    sha256 = hashlib.sha256()
    with file.open("rb") as opened:
        while piece := opened.read(1 << 20):
            sha256.update(piece)
    return {"sha256": sha256.hexdigest(), "size": file.stat().st_size}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        inside = file.parent / "bundle"  # the artifact of a release stage holds it so
        hint = f"did you mean {inside}?" if inside.is_dir() else "a bundle's folder is wanted"
        raise DeployError(f"{file}: it cannot be read ({error}); {hint}") from error
