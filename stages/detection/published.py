"""Files of weights that others published: found by name where torch keeps them, checked against the hash in their name, and
read without running anything that is in them. Nothing is downloaded."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline import digest
from pipeline.config import ExternalFile
from pipeline.errors import UserError, closest


class PublishedFile(ExternalFile):
    """A file of weights by its path, or by its name alone: then it may also lie in `weights/` or in the folder of torch hub
    (`$TORCH_HOME/hub/checkpoints`). torchvision's names of weights (`ResNet50_Weights.IMAGENET1K_V2`) mean their file."""

    what = "file of weights"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        given = os.fspath(path)
        found = _found(given) if os.path.basename(given) == given else None
        try:
            super().__init__(found or path)
        except ValueError as problem:
            raise ValueError(f"{problem}{_where_to_get(given)}") from problem
        self.given = given


def _found(name: str) -> Path | None:
    """Where a file of this name lies, the current folder first."""
    file = _urls().get(name, name).rpartition("/")[2] if "_Weights." in name else name
    folders = (Path(), Path("weights"), Path(torch.hub.get_dir()) / "checkpoints")
    return next((folder / file for folder in folders if (folder / file).is_file()), None)


def _urls() -> dict[str, str]:
    """File name, and torchvision's own name, of each of its published weights to where it is published."""
    from torchvision import models  # names and addresses of about a hundred files: only for who asks

    weights = [one for name in models.list_models() for one in models.get_model_weights(name)]
    return {key: one.url for one in weights for key in (one.url.rpartition("/")[2], str(one))}


def _where_to_get(given: str) -> str:
    """`; ...` with the command that fetches a file of torchvision's, or its nearest name, or nothing."""
    urls, name = _urls(), os.path.basename(given)
    if name in urls:
        return f"; it is torchvision's: curl -L --create-dirs -o weights/{urls[name].rpartition('/')[2]} {urls[name]}"
    near = closest(name, urls)
    return f"; of torchvision's the nearest name is {near}" if near else ""


def verify(file: Path) -> None:
    """Compare a file with the beginning of its sha256 that torchvision and OpenMMLab write at the end of its name.

    Raises UserError where they differ.
    """
    said = re.search(r"-([0-9a-f]{8})\.\w+$", file.name)
    if said and not (real := digest.of_file(file)).startswith(said[1]):
        raise UserError(
            f"{file}: its name says that its sha256 begins with {said[1]}, and it begins with {real[:8]}; fetch it again, or "
            "rename it where these digits mean something else"
        )


def read(file: Path) -> dict[str, Any]:
    """What a checkpoint holds: tensors by name, or a dict with them in it. Raises UserError where the file is not what its
    name says, or holds more than tensors and plain values."""
    verify(file)
    if file.suffix == ".safetensors":
        return dict(load_file(file))
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as problem:  # a dozen kinds, each the same news
        said = str(problem).strip().partition("\n")[0]
        raise UserError(
            f"{file}: not a file of tensors and plain values ({said}); save its state dict alone"
        ) from problem
    if not isinstance(found, Mapping):
        raise UserError(f"{file}: holds a {type(found).__name__}, not tensors by name; save the state dict")
    return dict(found)


def must_unpickle(file: Path, trust: bool, sha256: str | None) -> bool:
    """Whether only unpickling opens a file, which may run code: that needs the user's `trust` in the very file of this
    `sha256`. Raises UserError where it has neither, and where the file has another hash than given or in its name."""
    verify(file)
    real = digest.of_file(file)
    if sha256 is not None and sha256 != real:
        raise UserError(
            f"weights {file}: its sha256 is {real}, {sha256} was given; get the file that was meant, or set the hash of "
            "the one that you trust"
        )
    pickled = [] if file.suffix == ".safetensors" else unsafe_names(file)
    if pickled and not (trust and sha256):
        raise UserError(
            f"weights {file}: a pickled model, whose opening calls {', '.join(pickled[:3])} and may run any code that its "
            f"maker put in; if you trust who made it, set trust: true and sha256: {real}; else have its state dict saved"
        )
    return bool(pickled)


def unsafe_names(file: Path) -> list[str]:
    """The classes and functions that opening a checkpoint would call, beside those that torch knows to be harmless; none
    of a plain state dict, or of what is no checkpoint. Nothing is unpickled."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    except Exception:
        return []  # an old format or no checkpoint at all: `read`, which unpickles tensors alone, says what it is


def tensors(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict of what `read` gives, whether it lies at the top or inside."""
    inside = next((content[key] for key in ("state_dict", "model") if isinstance(content.get(key), Mapping)), content)
    return {str(key): value for key, value in inside.items() if isinstance(value, Tensor)}


def listed(names: Sequence[str], most: int = 20) -> str:
    """Names for a message, in one line, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "") or "none"
