"""Verification: whether a bundle is whole, and does here what it did where it was released."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deploy.bundle import MANIFEST, Bundle
from deploy.detections import Detections
from deploy.errors import DeployError
from deploy.parity import FLOAT16, FLOAT32, Parity, Tolerance, compare
from deploy.predictor import Predictor


@dataclass(frozen=True)
class Check:
    """One line of `verify`; `passed` is None where there was nothing to check."""

    name: str
    passed: bool | None
    detail: str


def verify(
    path: Path | str, tolerance: Tolerance | None = None, model: str | None = None, **settings: Any
) -> list[Check]:
    """Whether a bundle is whole and its model does here what it did where it was released.

    `model` is the file's name, by default that which is picked for this device. The tolerance, by default that of the
    file's precision, is in pixels of the network's input, so that a large sample image does not loosen or tighten it.
    `settings` are the backend's.
    """
    try:
        bundle = Bundle.open(path)
    except DeployError as error:
        return [Check("files", False, str(error))]
    checks = [Check("files", True, f"{len(bundle.release['files'])} files have the sizes and hashes of {MANIFEST}")]
    try:
        predictor = Predictor.open(bundle.path, model=model, **settings)
    except DeployError as error:
        return [*checks, Check("model", False, str(error))]
    with predictor:
        runtime = predictor.backend.identity()
        name = predictor.model.file if predictor.model else ""
        opened = f"{name} opens on {runtime['runtime']} {runtime['version']}, its contract is that of {MANIFEST}"
        checks.append(Check("model", True, opened))
        if bundle.sample_image is None:
            return [*checks, Check("sample", None, "the bundle has no sample")]
        expected = bundle.expected(name)
        if expected is None:
            return [*checks, Check("sample", None, f"what {name} finds in it was not recorded: it did not run there")]
        parity = _sample_parity(predictor, bundle.sample_image, expected, tolerance)
    return [*checks, Check("sample", parity.verdict, parity.sentence)]


def _sample_parity(predictor: Predictor, image: Path, expected: Detections, tolerance: Tolerance | None) -> Parity:
    upright = predictor.decode(image)
    _, placement = predictor.contract.image.prepare(upright)
    scale = max(a / b for a, b in zip(placement.original, placement.content, strict=True))
    # Another processor may sum fewer bits in another order; int8 too, whose kernels differ between processors.
    exact = predictor.model is None or predictor.model.precision == "fp32"
    allowed = tolerance or (FLOAT32 if exact else FLOAT16)
    scaled = replace(allowed, box_px=allowed.box_px * scale)
    found, contract = predictor([upright]), predictor.contract
    return compare([expected], found, scaled, contract.score_threshold, contract.max_detections)
