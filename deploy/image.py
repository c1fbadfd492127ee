"""An image file becomes the network's input, and boxes find their way back.

    file or bytes --decode--> RGB image --ImageSpec.prepare--> uint8 (H, W, 3) array + Placement
                                                               boxes <--Placement.to_original--

Training, validation and the device all prepare images here or by `ImageSpec.content_size`, so there is one rounding
rule and one family of resizing (antialiased bilinear).
"""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from deploy.errors import DeployError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

FITS = ("top_left", "centre", "stretch")


def decode(source: Path | str | bytes | Image.Image | NDArray[np.uint8]) -> Image.Image:
    """The RGB image in a file, in the bytes of a file, already open, or in an array of uint8 RGB (H, W, 3); upright,
    whatever its EXIF orientation says.

    16-bit grey is scaled to 8 bits, palettes, grey and CMYK are converted, alpha is dropped; of an animation the first
    frame counts. Raises DeployError, which names the file, when there is none or it cannot be read to its end.
    """
    if isinstance(source, np.ndarray):
        return _of_array(source)
    where = "image" if isinstance(source, bytes | Image.Image) else str(source)
    if not isinstance(source, bytes | Image.Image) and not os.path.isfile(source):
        raise DeployError(f"{where}: no such image file")
    try:
        upright = ImageOps.exif_transpose(source) if isinstance(source, Image.Image) else _read(source)
    except Exception as error:  # Pillow's parsers raise nearly anything on damaged bytes
        reason = "not an image Pillow knows" if isinstance(error, UnidentifiedImageError) else str(error)
        raise DeployError(f"{where}: the image cannot be read ({reason}); replace or remove the file") from error
    return _to_rgb(upright, where)


def _of_array(pixels_HWC: NDArray[np.uint8]) -> Image.Image:
    if pixels_HWC.dtype != np.uint8 or pixels_HWC.ndim != 3 or pixels_HWC.shape[2] != 3 or not pixels_HWC.size:
        raise DeployError(
            f"image: an array must be uint8 RGB of shape (height, width, 3), given {pixels_HWC.dtype} of shape "
            f"{pixels_HWC.shape}; convert it first"
        )
    return Image.fromarray(np.ascontiguousarray(pixels_HWC))


def _read(source: Path | str | bytes) -> Image.Image:
    # By its name where there is one: then Pillow loads one decoder; for anonymous bytes all common ones, 20 ms.
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return image


def _to_rgb(image: Image.Image, where: str) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode == "F":
        raise DeployError(
            f"{where}: the image has floating-point pixels, whose range is unknown; save it with 8 or 16 bits a channel"
        )
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would clip everything above 255
        wide = np.asarray(image).astype(np.int64)
        image = Image.fromarray((np.clip(wide, 0, 65535) >> 8).astype(np.uint8))
    return image.convert("RGB")


@dataclass(frozen=True)
class Placement:
    """Where an image lies in the network's input: its content has a size and starts at (top, left).

    Sizes are (height, width) in pixels.
    """

    original: tuple[int, int]
    content: tuple[int, int]
    start: tuple[int, int] = (0, 0)

    @property
    def limits_xyxy(self) -> NDArray[np.float32]:
        """The content's corners in input pixels."""
        (top, left), (height, width) = self.start, self.content
        return np.asarray([left, top, left + width, top + height], np.float32)

    def to_original(self, boxes_xyxy: NDArray[np.float32]) -> NDArray[np.float32]:
        """Boxes (N, 4) in input pixels as boxes in pixels of the original image, clipped to it."""
        height, width = self.original
        limits = np.asarray([width, height, width, height], np.float32)
        return np.clip((boxes_xyxy - self._shift()) * self._scale(), 0, limits).astype(np.float32)

    def to_input(self, boxes_xyxy: NDArray[np.float32]) -> NDArray[np.float32]:
        """Boxes (N, 4) in pixels of the original image as boxes in input pixels."""
        return (boxes_xyxy / self._scale() + self._shift()).astype(np.float32)

    def _shift(self) -> NDArray[np.float32]:
        return self.limits_xyxy[[0, 1, 0, 1]]

    def _scale(self) -> NDArray[np.float64]:
        # An axis at a time: rounding the content to whole pixels changes the two factors differently.
        y, x = (original / content for original, content in zip(self.original, self.content, strict=True))
        return np.asarray([x, y, x, y])


@dataclass(frozen=True)
class ImageSpec:
    """The network's input: an image is resized to `height` x `width`, by `fit`.

    top_left and centre keep the ratio of its sides, and what the image leaves is `pad_rgb`; of an odd rest the smaller
    half is above and to the left. stretch does not keep the ratio and leaves nothing. Our own detectors learn with
    top_left; the others are for models that came from elsewhere.
    """

    height: int
    width: int
    pad_rgb: tuple[int, int, int]
    fit: str = "top_left"

    def __post_init__(self) -> None:
        problems = []
        if not (_is_int(self.height) and _is_int(self.width) and self.height > 0 and self.width > 0):
            problems.append(f"height and width must be whole numbers above 0, not {self.height!r} x {self.width!r}")
        if not (len(self.pad_rgb) == 3 and all(_is_int(level) and 0 <= level <= 255 for level in self.pad_rgb)):
            problems.append(f"pad_rgb must be three whole numbers from 0 to 255, not {self.pad_rgb!r}")
        if self.fit not in FITS:
            problems.append(f"fit must be one of {', '.join(FITS)}, not {self.fit!r}")
        if problems:
            raise DeployError("image spec: " + "; ".join(problems))

    @property
    def sentence(self) -> str:
        """How an image is put into the input, for people who write their own preprocessing."""
        if self.fit == "stretch":
            return f"resized with antialias to {self.height}x{self.width} (height x width), whatever its ratio"
        place = self.fit.replace("_", " ")
        return (
            f"resized with antialias to fit {self.height}x{self.width} (height x width), placed {place}, the rest filled "
            f"with {list(self.pad_rgb)}"
        )

    def content_size(self, height: int, width: int) -> tuple[int, int]:
        """The (height, width) to which an image of this size is resized.

        The one rounding rule: half up, at least one pixel.
        """
        if self.fit == "stretch":
            return self.height, self.width
        scale = min(self.height / height, self.width / width)
        return (
            min(self.height, max(1, int(height * scale + 0.5))),
            min(self.width, max(1, int(width * scale + 0.5))),
        )

    def placement(self, height: int, width: int) -> Placement:
        """Where an image of this size lies in the network's input."""
        content = self.content_size(height, width)
        if self.fit != "centre":
            return Placement((height, width), content)
        return Placement((height, width), content, ((self.height - content[0]) // 2, (self.width - content[1]) // 2))

    def prepare(self, image: Image.Image) -> tuple[NDArray[np.uint8], Placement]:
        """An RGB image as the uint8 array (height, width, 3) of the network's input, and where it lies there."""
        placement = self.placement(image.height, image.width)
        (top, left), (height, width) = placement.start, placement.content
        bottom, right = top + height, left + width
        if placement.content != placement.original:
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        canvas = np.empty((self.height, self.width, 3), np.uint8)
        canvas[top:bottom, left:right] = np.asarray(image)
        canvas[:top] = canvas[bottom:] = self.pad_rgb
        canvas[top:bottom, :left] = canvas[top:bottom, right:] = self.pad_rgb
        return canvas, placement

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they stand in the contract; `fit` only where it is not top_left, so that readers that know no
        other refuse the files that they would feed wrongly, and no more."""
        values: dict[str, Any] = {"height": self.height, "width": self.width, "pad_rgb": list(self.pad_rgb)}
        return values if self.fit == FITS[0] else {**values, "fit": self.fit}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ImageSpec:
        """The inverse of `to_dict`. Raises DeployError on unknown, missing or impossible values."""
        if not isinstance(values, dict) or set(values) - {"fit"} != {"height", "width", "pad_rgb"}:
            raise DeployError(f"image spec: height, width and pad_rgb are wanted, and fit may be, given {values!r}")
        if not isinstance(values["pad_rgb"], list | tuple):
            raise DeployError(f"image spec: pad_rgb must be three whole numbers, not {values['pad_rgb']!r}")
        return cls(values["height"], values["width"], tuple(values["pad_rgb"]), values.get("fit", FITS[0]))


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
