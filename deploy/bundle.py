"""Bundle: the folder that ships. One model or several for several devices, what is known of them, and hashes that show
a change. `deploy.release` writes one.

README.md                 the model card, as the Hugging Face hub reads it
model.onnx, ...           the models, each with its contract inside or, for an engine, in a sidecar FILE.json
release.json              files and their sha256, models with contract, accuracy and latency, provenance, licence
sample/image.jpg          (if wanted) an image; what each model finds in it, and as sample/*.npy the reference's input
                          and raw outputs, for runtimes in other languages
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from deploy.detections import Detections
from deploy.digest import digest
from deploy.errors import DeployError
from deploy.manifest import Model, models_of, upgraded

if TYPE_CHECKING:
    from deploy.contract import Contract

MANIFEST = "release.json"


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
