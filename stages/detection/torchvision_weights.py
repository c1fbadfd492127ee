"""Published torchvision detection checkpoints under our names.

The module names are the same; what differs is the class axis (torchvision's COCO models have 91 outputs with holes,
category id = index) and the names of layers before torchvision 0.13.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor
from torchvision.models.detection import RetinaNet_ResNet50_FPN_Weights

COCO_NAMES: tuple[str, ...] = tuple(RetinaNet_ResNet50_FPN_Weights.COCO_V1.meta["categories"])


def class_rows(outputs: int, class_names: Sequence[str], background: bool) -> list[int] | None:
    """Which of a checkpoint's `outputs` classes are ours, by name; None where the axes are already the same.

    Raises ValueError where the checkpoint has COCO's 91 outputs and a class of ours is not one of COCO's, or where it
    has any other number: a row must never be guessed.
    """
    ours = len(class_names) + int(background)
    if outputs == ours and (outputs != len(COCO_NAMES) or background):
        return None
    if outputs != len(COCO_NAMES):
        raise ValueError(f"the checkpoint has {outputs} classes, the dataset {ours}; load its backbone only, or train")
    foreign = [name for name in class_names if name not in COCO_NAMES]
    if foreign:
        raise ValueError(f"the checkpoint knows COCO's classes, not {foreign[:3]}; load its backbone only, or train")
    rows = [COCO_NAMES.index(name) for name in class_names]
    return [0, *rows] if background else rows


def select_rows(tensor: Tensor, rows: list[int] | None, groups: int, classes: int, each: int) -> Tensor:
    """From an axis 0 laid out (groups, classes, each) keep the classes `rows`."""
    if rows is None:
        return tensor
    split = tensor.view(groups, classes, each, *tensor.shape[1:])
    return split[:, rows].reshape(-1, *tensor.shape[1:])


def modern_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tower layers were `conv.0, conv.2, ...` before torchvision 0.13 and are `conv.0.0, conv.1.0, ...` since."""

    def name(key: str) -> str:
        old = re.fullmatch(r"(head\.\w+\.conv)\.(\d+)\.(weight|bias)", key)
        return f"{old[1]}.{int(old[2]) // 2}.0.{old[3]}" if old else key

    return {name(key): value for key, value in state.items()}
