"""Release: a bundle is written, whole or not at all."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deploy import atomic
from deploy.bundle import MANIFEST, Bundle
from deploy.digest import digest
from deploy.errors import DeployError
from deploy.manifest import SCHEMA_VERSION, Model, problems_of
from deploy.sidecar import beside

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from deploy.contract import Contract
    from deploy.detections import Detections
    from deploy.image import Placement
    from deploy.predictor import Predictor

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
        "start": list(sample.placement.start),
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
