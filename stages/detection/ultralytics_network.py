"""Ultralytics' networks, losses and checkpoints: the one file that imports its package, which is AGPL-3.0 and an extra.

The import is made at first use, says the licence, and leaves the process as it was: the package would set environment
variables, filters of warnings and print options, and put functions of its own in place of `PIL.Image.open` and
`torch.save`. It is kept offline, from installing anything, and from writing into the user's home.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from torch import Tensor, nn

from pipeline.errors import UserError, did_you_mean
from pipeline.log import logger

LICENCE = "AGPL-3.0"
INSTALL = "pip install 'headstart[ultralytics]'"
# No question whether there is a network, hence no telemetry; no pip from inside; no banner.
_KEPT_QUIET = {"YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false", "YOLO_VERBOSE": "false"}
_OPENCV = ("opencv-python", "opencv-python-headless", "opencv-contrib-python", "opencv-contrib-python-headless")
_HEADS = ("Detect", "v10Detect")


@dataclass(frozen=True)
class Network:
    """A detection network taken apart: `layers` in their order, the last is its head; `sources[i]` are the layers whose
    outputs layer i reads (-1 is the one before); the first `backbone` layers are the backbone; `strides` of the levels."""

    layers: Sequence[nn.Module]
    sources: Sequence[tuple[int, ...]]
    backbone: int
    strides: tuple[int, ...]
    bins: int


@cache
def package() -> Path:
    """The package's folder; imports it once a process.

    Raises UserError where it is not installed, or where two builds of OpenCV overwrite each other's files.
    """
    found = importlib.util.find_spec("ultralytics")
    if found is None or found.origin is None:
        raise UserError(f"detector yolo: the package ultralytics is not installed; {INSTALL} (licence: {LICENCE})")
    if problem := two_opencvs():
        raise UserError(f"detector yolo: {problem}")
    logger.warning(
        "detector yolo: the package ultralytics is under %s, and its makers hold that models trained with it are, too; "
        "bundles say so (docs/how-to.md, Ultralytics)",
        LICENCE,
    )
    environment, opened, saved = dict(os.environ), Image.open, torch.save
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), np.printoptions():
        os.environ.update(_KEPT_QUIET | {"YOLO_CONFIG_DIR": folder})
        try:
            importlib.import_module("ultralytics.nn.tasks")
            importlib.import_module("ultralytics.utils.loss")
        finally:
            os.environ.clear()
            os.environ.update(environment)
            Image.open, torch.save = opened, saved
    return Path(found.origin).parent


def two_opencvs() -> str | None:
    """What is wrong where several builds of OpenCV are installed: they share the folder cv2, and the last one wins."""
    there = [name for name in _OPENCV if _installed(name)]
    if len(there) < 2:
        return None
    return (
        f"{' and '.join(there)} are both installed and share one folder, so neither is whole; keep one: "
        f"pip uninstall -y {' '.join(there)} && pip install {there[0]}"
    )


def _installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def described(name: str) -> dict[str, Any]:
    """The package's description of the detection network of this name, scale included: yolo11n, yolov8s-p2.

    Raises UserError where the installed release has none.
    """
    files = {file.stem: file for file in (package() / "cfg" / "models").rglob("yolo*.yaml")}
    parts = re.fullmatch(r"(yolov?\d+)([a-z])(-.*)?", name)
    scale = parts[2] if parts else ""
    file = files.get(name) or (files.get(f"{parts[1]}{parts[3] or ''}") if parts else None)
    if file is None:
        raise UserError(f"detector yolo: no network {name!r} in the installed ultralytics{did_you_mean(name, files)}")
    found: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    if found["head"][-1][2] not in _HEADS:
        raise UserError(f"detector yolo: {name} is no detection network with boxes alone; take yolo11n or its like")
    scales = found.get("scales") or {scale: None}
    if scale not in scales:
        raise UserError(f"detector yolo: {name} has no scale {scale!r}; add one of {', '.join(scales)}, as in yolo11n")
    return found | {"scale": scale, "yaml_file": file.name}


def network(name: str, classes: int, made_for: int) -> Network:
    """The network of this name with random weights for `classes` classes, its head as wide as for `made_for` of them, on
    torch's default device. Raises UserError for a name that the installed release does not know."""
    description, wanted = described(name), torch.get_default_device()
    from ultralytics.nn.tasks import DetectionModel

    with torch.device("cpu"):  # it measures its strides by a forward pass, which the meta device cannot
        model = DetectionModel(description, nc=made_for, verbose=False)
        head, strides = model.model[-1], tuple(int(stride) for stride in model.stride)
        if classes != made_for:
            for towers in (head.cv3, getattr(head, "one2one_cv3", ())):
                for tower, stride in zip(towers, strides, strict=True):
                    tower[-1] = nn.Conv2d(tower[-1].in_channels, classes, 1)
                    nn.init.constant_(tower[-1].bias, float(np.log(5 / classes / (640 / stride) ** 2)))
    bins, head.dfl = head.reg_max, nn.Identity()  # it holds the constants 0 to 15 as a parameter that never learns
    layers = list(model.model.to(wanted))
    sources = tuple((layer.f,) if isinstance(layer.f, int) else tuple(layer.f) for layer in layers)
    return Network(layers, sources, len(description["backbone"]), strides, bins)


Criterion = Callable[[Mapping[str, Any], Mapping[str, Tensor]], tuple[Tensor, Any]]


def criterion(
    classes: int,
    bins: int,
    strides: Sequence[int],
    gains: Mapping[str, float],
    one_to_one: bool,
    device: torch.device,
) -> Criterion:
    """Ultralytics' loss of one branch (utils/loss.py): boxes, scores and maps of the levels, and a batch of its kind, to
    the three parts box, cls and dfl (or l1), times the number of images. `gains` are those of box, cls and dfl; a
    one-to-one branch assigns as E2ELoss has it."""
    package()
    from ultralytics.utils.loss import v8DetectionLoss

    # It reads four things of a model.
    head = SimpleNamespace(stride=torch.tensor([float(s) for s in strides], device=device), nc=classes, reg_max=bins)
    model = SimpleNamespace(
        parameters=lambda: iter([head.stride]), args=SimpleNamespace(**gains), model=[head], class_weights=None
    )
    made = v8DetectionLoss(model, tal_topk=7, tal_topk2=1) if one_to_one else v8DetectionLoss(model, tal_topk=10)
    loss: Criterion = made.loss
    return loss


def unpickled(file: Path) -> tuple[dict[str, Tensor], list[str]]:
    """State dict (keys `model.N...`, float32) and class names of a whole model that Ultralytics pickled.

    Only classes of torch and of the installed ultralytics are made, by the package's own list of allowed ones: the file
    runs no code of its own. Raises ValueError where it wants others, and where it holds no detection network.
    """
    package()
    from ultralytics.nn.tasks import DetectionModel, torch_safe_load

    try:
        loaded = torch_safe_load(str(file), safe_only=True)[0]
    except Exception as problem:  # it raises a dozen kinds, some of which would have installed something
        wanted = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))
        raise ValueError(f"it is no checkpoint of the installed ultralytics, it wants {wanted[:5]}") from problem
    model = loaded.get("ema") or loaded.get("model") if isinstance(loaded, dict) else None
    if not isinstance(model, DetectionModel) or type(model.model[-1]).__name__ not in _HEADS:
        raise ValueError("it holds no detection network of the kinds v8, v10, 11 or 26")
    state = {key: value.float() if value.is_floating_point() else value for key, value in model.state_dict().items()}
    return state, [model.names[label] for label in sorted(model.names)]
