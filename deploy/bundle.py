"""Bundle: the folder that ships. One model or several for several devices, what is known of them, and hashes that show
a change.

README.md                 the model card, as the Hugging Face hub reads it
model.onnx, ...           the models, each with its contract inside or, for an engine, in a sidecar FILE.json
release.json              files and their sha256, models with contract, accuracy and latency, provenance, licence
sample/image.jpg          (if wanted) an image; what each model finds in it, and as sample/*.npy the reference's input
                          and raw outputs, for runtimes in other languages
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from deploy import atomic
from deploy.detections import Detections
from deploy.digest import digest
from deploy.errors import DeployError
from deploy.manifest import SCHEMA_VERSION, Model, models_of, problems_of, upgraded
from deploy.sidecar import beside

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from deploy.contract import Contract
    from deploy.image import Placement
    from deploy.predictor import Predictor

MANIFEST = "release.json"
_GIVEN = ("name", "provenance", "licence")  # by whoever releases


@dataclass(frozen=True)
class Sample:
    """An image, what each model finds in it, and what the reference takes and gives on the way.

    `detections` are by the model's name in the bundle, at the contract's threshold; `tensors` by their names: the
    input, uint8 (1, H, W, 3), and the candidates, float32 (1, K, 4), float32 (1, K) and int64 (1, K); `placement` is
    where the image lies in that input.
    """

    image: Path
    placement: Placement
    detections: Mapping[str, Detections]
    tensors: Mapping[str, NDArray[Any]]

    @classmethod
    def take(cls, image: Path, predictors: Mapping[str, Predictor]) -> Sample:
        """What these predictors find, each under its model's name; the tensors are those of the first."""
        detections = {name: predictor([image])[0] for name, predictor in predictors.items()}
        first = next(iter(predictors.values()))
        images_BHWC, (placement,) = first.prepare([first.decode(image)])
        found = first.infer(images_BHWC)
        names = first.contract.input_name, *first.contract.output_names
        arrays = images_BHWC, found.boxes_BN4, found.scores_BN, found.labels_BN
        return cls(image, placement, detections, dict(zip(names, arrays, strict=True)))


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its folder, its models and all of release.json, as this release of Headstart would write it."""

    path: Path
    models: tuple[Model, ...]
    release: dict[str, Any]

    @property
    def contract(self) -> Contract:
        """That of the first model, the reference. The others have the same image, classes and thresholds."""
        return self.models[0].contract

    @property
    def sample_image(self) -> Path | None:
        """The image of the sample; None when the bundle has none."""
        return self.path / self.release["sample"]["image"] if self.release["sample"] else None

    def expected(self, file: str) -> Detections | None:
        """What that model found in the sample when it was released; None where that was not recorded."""
        recorded = self.release["sample"]["detections"].get(file) if self.release["sample"] else None
        return None if recorded is None else Detections.from_list(_read_json(self.path / recorded))

    def model(self, file: str) -> Model:
        """The model of that name. Raises DeployError with the names there are."""
        for model in self.models:
            if model.file == file:
                return model
        raise DeployError(f"{self.path}: no model {file!r}; choose one of {', '.join(one.file for one in self.models)}")

    def pick(self, backend: str | None = None, provider: str | None = None) -> tuple[Model, str | None]:
        """The fastest way to run this bundle here, a model and a provider of ONNX Runtime (None is its default); by that
        backend or provider alone, if named.

        Raises DeployError when nothing in it runs here, with every reason. A backend that no model was made for gets
        the reference, and says itself whether it can read that.
        """
        wanted = "onnxruntime" if backend is None and provider is not None else backend
        models = [model for model in self.models if wanted in (None, model.backend)] or [self.models[0]]
        if len(models) == 1 and not models[0].made_for and len(models[0].ways(provider)) == 1:
            return models[0], None  # nothing to choose: a device need not be asked what it is
        from deploy.selection import choose, this_device

        chosen = choose(models, this_device(models), provider)
        return chosen.model, chosen.provider

    @classmethod
    def open(cls, path: Path | str) -> Bundle:
        """Opens a bundle after checking that it is whole.

        Raises DeployError naming what is missing, changed or unknown to this release.
        """
        path = Path(path)
        release = upgraded(_read_json(path / MANIFEST), str(path / MANIFEST))
        if problems := _file_problems(path, release):
            raise DeployError(f"{path}: " + "; ".join(problems) + "; copy the bundle again from where it was released")
        return cls(path, models_of(release, str(path / MANIFEST)), release)


def write(
    directory: Path,
    models: Sequence[tuple[Path, Model]],
    release: dict[str, Any],
    card: str,
    sample: Sample | None = None,
) -> Bundle:
    """Writes a bundle, which appears whole or not at all, and opens it.

    `models` are files and what is known of them, the reference first; a sidecar FILE.json beside a file goes with it.
    `release` has name, provenance and licence; `card` is the model card. Raises DeployError when the folder exists,
    something lacks, a file is not the one that was measured, or a sample proves nothing.
    """
    directory = Path(directory)
    problems = [f"{name} is missing" for name in _GIVEN if name not in release]
    problems += [f"{name!r} is unknown" for name in release if name not in _GIVEN]
    problems += problems_of(tuple(model for _, model in models))
    problems += [
        f"{file} is not the file that {model.file} describes: its sha256 is another"
        for file, model in models
        if digest(file)["sha256"] != model.sha256
    ]
    if sample is not None:
        problems += _sample_problems(sample, [model.file for _, model in models])
    if directory.exists():
        problems.append("the folder exists; choose another or remove it")
    if problems:
        raise DeployError(f"{directory}: " + "; ".join(problems))
    from datetime import datetime, timezone

    with atomic.new_folder(directory) as partial:
        (partial / "README.md").write_text(card, encoding="utf-8")
        for file, model in models:
            shutil.copyfile(file, partial / model.file)
            if (sidecar := beside(file)).is_file():
                shutil.copyfile(sidecar, beside(partial / model.file))
        described = _write_sample(partial, sample, models[0][1].contract) if sample else None
        files = sorted(file for file in partial.rglob("*") if file.is_file())
        manifest = release | {
            "schema_version": SCHEMA_VERSION,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "files": {file.relative_to(partial).as_posix(): digest(file) for file in files},
            "classes": list(models[0][1].contract.classes),
            "models": [model.to_dict() for _, model in models],
            "sample": described,
        }
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return Bundle.open(directory)


def _sample_problems(sample: Sample, files: Sequence[str]) -> list[str]:
    problems = [f"the sample speaks of an unknown model {name}" for name in sample.detections if name not in files]
    if files and files[0] not in sample.detections:
        problems.append(f"the sample does not say what the reference {files[0]} finds")
    if not all(len(found) for found in sample.detections.values()):
        problems.append("a sample without detections proves nothing; choose another image or none")
    return problems


def _write_sample(partial: Path, sample: Sample, contract: Contract) -> dict[str, Any]:
    described: dict[str, Any] = {
        "image": f"sample/image{sample.image.suffix.lower()}",
        "original": list(sample.placement.original),
        "content": list(sample.placement.content),
        "detections": {},
        "tensors": {},
    }
    (partial / "sample").mkdir()
    shutil.copyfile(sample.image, partial / described["image"])
    for place, (name, found) in enumerate(sample.detections.items()):
        file = "sample/detections.json" if place == 0 else f"sample/{name}.detections.json"
        rows = json.dumps(found.to_list(contract.classes), indent=2)
        (partial / file).write_text(rows + "\n", encoding="utf-8")
        described["detections"][name] = file
    for name, array in sample.tensors.items():
        described["tensors"][name] = f"sample/{name}.npy"
        np.save(partial / described["tensors"][name], np.ascontiguousarray(array))
    return described


def _file_problems(path: Path, release: dict[str, Any]) -> list[str]:
    named = [model.get("file") for model in release["models"] if isinstance(model, dict)]
    problems = [f"{MANIFEST} does not list {name}" for name in named if name not in release["files"]]
    sample = release["sample"]
    if sample is not None:
        files = [sample.get("image"), *sample.get("detections", {}).values(), *sample.get("tensors", {}).values()]
        if not set(files) <= set(release["files"]):
            problems.append(f"{MANIFEST} does not list the files of the sample")
    for name, wanted in release["files"].items():
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            problems.append(f"{name} lies outside the bundle")
        elif not (path / name).is_file():
            problems.append(f"{name} is missing")
        elif digest(path / name) != wanted:
            problems.append(f"{name} was changed after the release")
    return problems


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        inside = file.parent / "bundle"  # the artifact of a release stage holds it so
        hint = f"did you mean {inside}?" if inside.is_dir() else "a bundle's folder is wanted"
        raise DeployError(f"{file}: it cannot be read ({error}); {hint}") from error
