"""Detectors from artifacts: settings and weights to a module, and back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline.config import Choice
from pipeline.errors import UserError
from stages.detection import openmmlab
from stages.detection.detector import Detector
from stages.detection.published import listed, must_unpickle, read, tensors


def build_detector(settings: Mapping[str, Any], classes: int) -> Detector:
    """A detector with random weights from `{name: ..., settings}`."""
    choice = Choice.parse(Detector, dict(settings))
    detector: Detector = choice.cls.build(choice.config, classes)
    return detector


def load_detector(settings: Mapping[str, Any], classes: int, weights: Path) -> Detector:
    """The same with weights from a safetensors file, strictly, in eval mode."""
    detector = build_detector(settings, classes)
    detector.load_state_dict(load_file(weights))
    return detector.eval()


def load_published(
    detector: Detector, file: Path, class_names: Sequence[str], trust: bool = False, sha256: str | None = None
) -> None:
    """Put a checkpoint (ours in safetensors, torchvision's, OpenMMLab's, or what else the detector takes) into a detector,
    strictly.

    A file that only unpickling opens needs `trust` and `sha256`, see `published.must_unpickle`. Raises UserError where it has
    them not, where the file is not what its name or its hash says, its tensors are not this detector's, or it was trained
    with other settings than the detector has.
    """
    pickled = must_unpickle(file, trust, sha256)
    content = {} if pickled else read(file)
    try:
        if file.suffix == ".safetensors":
            known = class_names_of(file)
            if known is not None and known != list(class_names):
                raise ValueError(
                    f"it knows the classes {known[:5]}, the dataset has {list(class_names[:5])} (first five)"
                )
            state = tensors(content)
        elif pickled:
            state = detector.unpickle(file, class_names)
        elif openmmlab.is_openmmlab(content):
            state = openmmlab.convert(detector, content, class_names)
        else:
            state = detector.convert(tensors(content), class_names)
        missing, unexpected = detector.load_state_dict(state, strict=False)
    except Exception as problem:  # torch raises a dozen kinds here; each is the same news to the user
        raise UserError(f"weights {file}: not a checkpoint of {type(detector).__name__}: {problem}") from problem
    missing = [key for key in missing if not key.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise UserError(
            f"weights {file}: {len(missing)} tensors are missing ({listed(missing)}) and {len(unexpected)} do not belong to "
            f"{type(detector).__name__} ({listed(unexpected)}); set the detector's settings as the file was trained"
        )


def load_backbone(detector: Detector, file: Path) -> None:
    """Put a classification checkpoint, or the backbone of a detector's, into the backbone of a detector. Raises UserError
    where `Detector.load_backbone` says that it is none for it."""
    state = tensors(read(file))
    try:
        detector.load_backbone(state)
    except ValueError as problem:
        raise UserError(f"backbone_weights {file}: {problem}") from problem


def save_weights(module: nn.Module, file: Path, class_names: Sequence[str]) -> None:
    """Write a module's tensors with the classes they know; the same tensors give the same bytes."""
    state = {key: value.detach().cpu().contiguous() for key, value in module.state_dict().items()}
    save_file(state, file, {"classes": json.dumps(list(class_names))})


def class_names_of(file: Path) -> list[str] | None:
    """The classes that a weights file of ours knows; None where it does not say."""
    with safe_open(file, "pt") as opened:
        said = (opened.metadata() or {}).get("classes")
    return None if said is None else list(json.loads(said))


def checksum(module: nn.Module) -> str:
    """sha256 over names and bytes of all tensors."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def parameter_count(module: nn.Module) -> int:
    """Learnt numbers of a module: its parameters, and not the statistics of its normalisation."""
    return sum(parameter.numel() for parameter in module.parameters())
