"""One training image on its canvas: resized and padded as the device does it, and, if asked for, augmented on the way.

    sample -> resize to scale x ImageSpec.content_size -> crop what is larger than the canvas -> flip -> shift -> pad

Everything is uint8 with torchvision's antialiased bilinear resize, which is at most one level from the device's Pillow.
The content always lies at the top left and padding only right and below, as at inference, so flip and shift act on the
content, not on the canvas. The canvas never changes its size: every batch has one shape, whatever scales are in it. A
scale below 1 leaves more padding; a scale above 1 shows a random window of the enlarged image.
"""

from __future__ import annotations

from typing import Annotated, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from deploy.image import ImageSpec
from pipeline.config import BaseConfig
from stages.data.coco import Sample

MIN_SIDE_PX = 1.0
MIN_VISIBLE = 0.1


class AugmentConfig(BaseConfig):
    """How training images are varied; by default not at all."""

    flip: float = Field(default=0.0, ge=0, le=1)
    """Probability of mirroring left and right."""
    shift: int = Field(default=0, ge=0)
    """Largest shift up, down, left or right in pixels of the canvas; what comes into view is the image, mirrored."""
    scales: tuple[Annotated[float, Field(gt=0, le=4)], ...] = Field(default=(1.0,), min_length=1)
    """Sizes drawn from, relative to the size at which the image fits the canvas."""


class Placed(NamedTuple):
    """A sample on the canvas."""

    image_CHW: Tensor
    """uint8, of the canvas's size."""
    boxes_N4: Tensor
    """float32 xyxy in pixels of the canvas, clipped to the content."""
    labels_N: Tensor
    size: tuple[int, int]
    """(height, width) of the content, which begins at the top left."""


def place(sample: Sample, spec: ImageSpec, config: AugmentConfig, rng: np.random.Generator) -> Placed:
    """Put one sample on the canvas; every draw is from `rng`.

    A box with a side below one pixel, or of which less than a tenth remains in view, is left out. Raises ValueError for
    a canvas on which images do not lie top left: our detectors learn with no other.
    """
    if spec.fit != "top_left":
        raise ValueError(f"place: images lie top left in training, not {spec.fit}")
    # Pixels are moved by NumPy: torch would wake its threads for a copy of 50 kB, and on a busy machine wait for them.
    original = sample.image.height, sample.image.width
    scale = float(rng.choice(config.scales))
    fitted = spec.content_size(*original)
    full = fitted if scale == 1 else tuple(max(1, round(side * scale)) for side in fitted)
    resized_CHW = transforms.resize(transforms.pil_to_tensor(sample.image), list(full), antialias=True)
    size = min(full[0], spec.height), min(full[1], spec.width)
    top, left = (int(rng.integers(f - s, endpoint=True)) for f, s in zip(full, size, strict=True))
    content_CHW = resized_CHW[:, top : top + size[0], left : left + size[1]]
    # Boxes stay unclipped until the end: what share of one is in view is known only then.
    factor = np.asarray([full[1] / original[1], full[0] / original[0]] * 2)
    boxes_N4 = sample.boxes_N4.numpy() * factor - [left, top, left, top]
    if rng.random() < config.flip:
        content_CHW = transforms.horizontal_flip(content_CHW)
        boxes_N4 = boxes_N4[:, [2, 1, 0, 3]] * [-1, 1, -1, 1] + [size[1], 0, size[1], 0]
    reach = min(config.shift, size[0] - 1, size[1] - 1)
    if reach:
        down, right = (int(d) for d in rng.integers(-reach, reach, 2, endpoint=True))
        wider_CHW = np.pad(content_CHW.numpy(), ((0, 0), (reach, reach), (reach, reach)), mode="reflect")
        content_CHW = torch.from_numpy(wider_CHW)[:, reach - down :, reach - right :][:, : size[0], : size[1]]
        boxes_N4 = boxes_N4 + np.asarray([right, down, right, down])
    boxes_N4, kept = _in_view(boxes_N4, size)
    canvas_CHW = np.empty((3, spec.height, spec.width), np.uint8)
    canvas_CHW[:] = np.asarray(spec.pad_rgb, np.uint8)[:, None, None]
    canvas_CHW[:, : size[0], : size[1]] = content_CHW.numpy()
    labels_N = sample.labels_N[torch.from_numpy(kept)]
    return Placed(torch.from_numpy(canvas_CHW), torch.from_numpy(boxes_N4.astype(np.float32)), labels_N, size)


def _in_view(boxes_N4: NDArray[np.float64], size: tuple[int, int]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Boxes clipped to the content, without those of which too little is left; and which those are not."""
    clipped_N4 = boxes_N4.clip(0, [size[1], size[0]] * 2)
    sides_N2, before_N2 = clipped_N4[:, 2:] - clipped_N4[:, :2], boxes_N4[:, 2:] - boxes_N4[:, :2]
    kept_N = (sides_N2 >= MIN_SIDE_PX).all(1) & (sides_N2.prod(1) >= MIN_VISIBLE * before_N2.prod(1))
    return clipped_N4[kept_N], kept_N
