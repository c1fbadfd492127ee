"""Detectors from artifacts: settings and weights to a module, and back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.config import Choice
from pipeline.errors import UserError
from stages.detection.detector import Detector


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
    """Put a checkpoint (ours in safetensors, or a published one) into a detector, strictly.

    A file that only unpickling opens may run code: it needs the user's `trust` in the very file of this `sha256`. Raises
    UserError where it has neither, where the file has another hash, and where its tensors are not this detector's.
    """
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if sha256 is not None and sha256 != digest:
        raise UserError(
            f"weights {file}: its sha256 is {digest}, {sha256} was given; get the file that was meant, or set the hash of "
            "the one that you trust"
        )
    pickled = [] if file.suffix == ".safetensors" else unsafe_names(file)
    if pickled and not (trust and sha256):
        raise UserError(
            f"weights {file}: a pickled model, whose opening calls {', '.join(pickled[:3])} and may run any code that its "
            f"maker put in; if you trust who made it, set trust: true and sha256: {digest}; else have its state dict saved"
        )
    try:
        if file.suffix == ".safetensors":
            known = class_names_of(file)
            if known is not None and known != list(class_names):
                raise ValueError(
                    f"it knows the classes {known[:5]}, the dataset has {list(class_names[:5])} (first five)"
                )
            state: dict[str, Tensor] = load_file(file)
        elif pickled:
            state = detector.unpickle(file, class_names)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
            state = detector.convert(state, class_names)
        missing, unexpected = detector.load_state_dict(state, strict=False)
    except Exception as problem:  # torch raises a dozen kinds here; each is the same news to the user
        raise UserError(f"weights {file}: not a checkpoint of {type(detector).__name__}: {problem}") from problem
    missing = [key for key in missing if not key.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise UserError(
            f"weights {file}: {len(missing)} tensors are missing ({missing[:3]}) and {len(unexpected)} do not belong to "
            f"{type(detector).__name__} ({unexpected[:3]}); set the detector's settings as the file was trained"
        )


def unsafe_names(file: Path) -> list[str]:
    """The classes and functions that opening a checkpoint would call, beside those that torch knows to be harmless; none
    of a plain state dict, or of what is no checkpoint. Nothing is unpickled."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    except Exception:
        return []  # an old format or no checkpoint at all: the loader, which unpickles tensors alone, says what it is


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
