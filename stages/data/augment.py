"""One training image on its canvas: resized and padded as the device does it, and, if asked for, augmented on the way.

    sample -> resize to scale x ImageSpec.content_size -> crop what is larger than the canvas -> flip -> shift -> pad

Everything is uint8 with torchvision's antialiased bilinear resize, which is at most one level from the device's Pillow.
The content always lies at the top left and padding only right and below, as at inference, so flip and shift act on the
content, not on the canvas. The canvas never changes its size: every batch has one shape, whatever scales are in it. A
scale below 1 leaves more padding; a scale above 1 shows a random window of the enlarged image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torchvision.transforms.v2 import functional as transforms

from deploy.image import ImageSpec
from pipeline.config import BaseConfig
from stages.data.coco import Sample
from stages.data.photometric import PhotometricConfig

MIN_SIDE_PX = 1.0
MIN_VISIBLE = 0.1

Pixels = NDArray[np.uint8]
Scale = Annotated[float, Field(gt=0, le=4)]


class AugmentConfig(BaseConfig):
    """How training images are varied; by default not at all."""

    flip: float = Field(default=0.0, ge=0, le=1)
    """Probability of mirroring left and right."""
    shift: int = Field(default=0, ge=0)
    """Largest shift up, down, left or right in pixels of the canvas; what comes into view is the image, mirrored."""
    scales: tuple[Scale, ...] = Field(default=(1.0,), min_length=1)
    """Sizes drawn from, relative to the size at which the image fits the canvas."""
    jitter: tuple[Scale, Scale] = (1.0, 1.0)
    """Least and largest factor on that size, drawn evenly by its logarithm; above 1 a random window of the image is seen."""
    photometric: PhotometricConfig = PhotometricConfig()
    """Distortion of the colours."""
    mosaic: float = Field(default=0.0, ge=0, le=1)
    """Probability of showing four images at once: the one whose turn it is and three others, about a random centre."""
    mosaic_jitter: tuple[Scale, Scale] = (0.4, 1.0)
    """As `jitter`, for the images of a mosaic; 1 shows each as large as if it were alone, and cuts most of it off."""
    mixup: float = Field(default=0.0, ge=0, le=1)
    """Probability of blending with another image, each about half visible; the objects of both count."""
    switch_off: float | None = Field(default=None, ge=0)
    """Epoch from which mosaic and mixup are off, so that training ends on images as they will be met; never if not given."""

    @model_validator(mode="after")
    def _possible(self) -> AugmentConfig:
        for name in ("jitter", "mosaic_jitter"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name}: from {low:g} to {high:g} is no range; give the smaller factor first")
        if self.switch_off is not None and not (self.mosaic or self.mixup):
            raise ValueError("switch_off: neither mosaic nor mixup is on; set one, or remove switch_off")
        return self

    @property
    def one_size(self) -> bool:
        """Whether every image is always resized to fit the canvas exactly."""
        return self.scales == (1.0,) and self.jitter == (1.0, 1.0) and not self.mosaic


class Laid(NamedTuple):
    """Where one sample's image came to lie, and so its boxes: x of the image is at origin + offset + factor * x."""

    boxes_N4: NDArray[np.float32]
    """xyxy in pixels of the image's file."""
    labels_N: NDArray[np.int64]
    factor: tuple[float, float]
    """Of x and of y; of a mirrored image the x factor is below 0."""
    offset: tuple[int, int]
    """(x, y) in pixels."""
    view: tuple[int, int, int, int]
    """xyxy of what shows the image, which boxes are clipped to; what a shift brought in is none of it."""
    origin: tuple[int, int] = (0, 0)
    """(x, y) of the content on the canvas."""

    def in_view(self) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Boxes in pixels of the canvas, clipped, and their labels; without those of which too little is left."""
        boxes_N4 = self.boxes_N4 * np.asarray(self.factor * 2) + self.offset * 2
        if self.factor[0] < 0:
            boxes_N4 = boxes_N4[:, [2, 1, 0, 3]]
        clipped_N4 = np.minimum(np.maximum(boxes_N4, self.view[:2] * 2), self.view[2:] * 2)
        sides_N2, before_N2 = clipped_N4[:, 2:] - clipped_N4[:, :2], boxes_N4[:, 2:] - boxes_N4[:, :2]
        kept_N = (sides_N2 >= MIN_SIDE_PX).all(1) & (sides_N2.prod(1) >= MIN_VISIBLE * before_N2.prod(1))
        return (clipped_N4[kept_N] + self.origin * 2).astype(np.float32), self.labels_N[kept_N]


@dataclass(frozen=True)
class Placed:
    """A canvas and whose images are on it."""

    canvas_HWC: Pixels
    parts: tuple[Laid, ...]
    size: tuple[int, int]
    """(height, width) of the content, which begins at the top left."""

    @property
    def content_HWC(self) -> Pixels:
        """The part of the canvas that is not padding."""
        return self.canvas_HWC[: self.size[0], : self.size[1]]

    def targets(self) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Boxes (N, 4), xyxy in pixels of the canvas, clipped to what is in view, and their labels (N).

        Worked out when asked for, not while images are decoded: decoding drives everything else from the processor's
        caches, and a batch's boxes at one go take a fraction of the time.
        """
        boxes, labels = zip(*(part.in_view() for part in self.parts), strict=True)
        return (boxes[0], labels[0]) if len(boxes) == 1 else (np.concatenate(boxes), np.concatenate(labels))


def place(
    sample: Sample, spec: ImageSpec, config: AugmentConfig, rng: np.random.Generator, canvas_HWC: Pixels | None = None
) -> Placed:
    """Put one sample on `canvas_HWC`, or on a new one; every draw is from `rng`.

    A box with a side below one pixel, or of which less than a tenth remains in view, is left out. Raises ValueError for
    a canvas on which images do not lie top left: our detectors learn with no other.
    """
    if spec.fit != "top_left":
        raise ValueError(f"place: images lie top left in training, not {spec.fit}")
    scale = _drawn_of(config.scales, rng) * drawn_factor(config.jitter, rng)
    canvas_HWC = np.empty((spec.height, spec.width, 3), np.uint8) if canvas_HWC is None else canvas_HWC
    return put(sample, scaled(spec.content_size(*sample.size), scale), spec, config, rng, canvas_HWC)


def put(
    sample: Sample,
    full: tuple[int, int],
    spec: ImageSpec,
    config: AugmentConfig,
    rng: np.random.Generator,
    canvas_HWC: Pixels,
) -> Placed:
    """Resize one sample to (height, width) `full` and put what of it fits at the top left of a canvas, which may be part of
    a larger one; flip and shift it."""
    content_HWC = resized(sample.pixels_HWC, full)
    fy, fx = (new / old for new, old in zip(full, sample.size, strict=True))
    size, x, y, right, down = full, 0, 0, 0, 0
    if full[0] > canvas_HWC.shape[0] or full[1] > canvas_HWC.shape[1]:
        size = min(full[0], canvas_HWC.shape[0]), min(full[1], canvas_HWC.shape[1])
        top, left = (int(rng.integers(f - s, endpoint=True)) for f, s in zip(full, size, strict=True))
        content_HWC = content_HWC[top : top + size[0], left : left + size[1]]
        x, y = -left, -top
    if rng.random() < config.flip:
        content_HWC = _mirrored(content_HWC)
        fx, x = -fx, size[1] - x
    reach = min(config.shift, size[0] - 1, size[1] - 1)
    if reach:
        down, right = (int(d) for d in rng.integers(-reach, reach, 2, endpoint=True))
        content_HWC = np.pad(content_HWC, ((reach, reach), (reach, reach), (0, 0)), mode="reflect")
        content_HWC = content_HWC[reach - down :, reach - right :][: size[0], : size[1]]
        x, y = x + right, y + down
    _lay(content_HWC, canvas_HWC, spec.pad_rgb)
    view = max(0, right), max(0, down), size[1] + min(0, right), size[0] + min(0, down)
    return Placed(canvas_HWC, (Laid(sample.boxes_N4, sample.labels_N, (fx, fy), (x, y), view),), size)


def _lay(content_HWC: Pixels, canvas_HWC: Pixels, pad_rgb: tuple[int, int, int]) -> None:
    """Copy the content to the top left, unless it was decoded there, and pad what it leaves."""
    height, width, _ = content_HWC.shape
    padding_WC = _padding(pad_rgb, canvas_HWC.shape[1])
    if not np.may_share_memory(content_HWC, canvas_HWC):
        canvas_HWC[:height, :width] = content_HWC
    if height < canvas_HWC.shape[0]:
        canvas_HWC[height:] = padding_WC
    if width < canvas_HWC.shape[1]:
        canvas_HWC[:height, width:] = padding_WC[width:]


def _drawn_of(scales: tuple[float, ...], rng: np.random.Generator) -> float:
    return scales[0] if len(scales) == 1 else scales[int(rng.integers(len(scales)))]


def drawn_factor(jitter: tuple[float, float], rng: np.random.Generator) -> float:
    """A factor between both, evenly by its logarithm; where they are equal nothing is drawn."""
    low, high = jitter
    return low if low == high else math.exp(rng.uniform(math.log(low), math.log(high)))


def scaled(size: tuple[int, int], scale: float) -> tuple[int, int]:
    """(height, width) times `scale`, at least one pixel."""
    return size if scale == 1 else (max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))


def resized(pixels_HWC: Pixels, size: tuple[int, int]) -> Pixels:
    """The image at (height, width) `size`; the same array where it has it already."""
    if pixels_HWC.shape[:2] == size:
        return pixels_HWC
    image_CHW = torch.from_numpy(pixels_HWC).permute(2, 0, 1)
    made_CHW = transforms.resize(image_CHW, list(size), antialias=True)
    return made_CHW.permute(1, 2, 0).numpy()  # type: ignore[no-any-return]


@lru_cache(maxsize=4096)
def _padding(rgb: tuple[int, int, int], width: int) -> Pixels:
    """A row of padding, to be copied whole: to spread three levels over a canvas takes ten times as long."""
    return np.tile(np.asarray(rgb, np.uint8), (width, 1))


def _mirrored(pixels_HWC: Pixels) -> Pixels:
    # By torch: NumPy copies a reversed axis of three bytes a pixel one byte at a time.
    return torch.from_numpy(pixels_HWC).flip(1).numpy()
