"""Plate digits: handwritten digits on plates over crops of two photographs, made from what scikit-learn ships.

Real ink and real backgrounds, seconds to make, no download. The classes are hard enough that help shows, and easy
enough for minutes on a CPU. Train and val share neither a digit nor a part of a photograph. The same settings give the
same files, bit for bit, and image i of a split does not depend on how many there are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field

from pipeline.config import BaseConfig
from pipeline.log import progress
from stages.data.source import RawDataset, RawSplit, Source

ATTRIBUTION = """Plate digits is made from data that scikit-learn carries.

Photographs, under CC BY 2.0 (https://creativecommons.org/licenses/by/2.0/); cropped, scaled, brightened or darkened,
noise added, plates drawn over them:
  china.jpg   by danielbuechele, https://www.flickr.com/photos/danielbuechele/6061409035/
  flower.jpg  by vultilion, https://www.flickr.com/photos/vultilion/6056698931/
Digits: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998,
https://doi.org/10.24432/C50P49, under CC BY 4.0 (https://creativecommons.org/licenses/by/4.0/); scaled, coloured.
"""

TRAIN_COLUMNS = 384  # of the photographs' 640: those left of it are for training, the others for validation
TRAIN_DIGITS = 0.7
PLATES = (1, 5)
PLATE_PX = (18.0, 44.0)
LOG_ASPECT = 0.2
MARGIN = 0.08
CROP_PX = (128, 220)
BRIGHTNESS = (0.6, 1.2)
NOISE_SIGMA = 8.0
PLATE_LEVEL = (150.0, 255.0)
INK_LEVEL = (0.0, 90.0)
MIN_CONTRAST = 60.0
JPEG_QUALITY = 92


@dataclass(frozen=True)
class Material:
    """What the images of one split are made of: `digits_D88` in [0, 255] with their `values_D`, and photo regions."""

    digits_D88: NDArray[np.uint8]
    values_D: NDArray[np.int64]
    photos: tuple[Image.Image, ...]


class Digits(Source):
    """The built-in dataset."""

    made = True

    class Config(BaseConfig):
        """How much of it, and which."""

        train: int = Field(default=3000, ge=1)
        """Training images."""
        val: int = Field(default=300, ge=1)
        """Validation images."""
        size: int = Field(default=128, ge=64, le=1024)
        """Height and width of the images in pixels; plates keep their size."""
        seed: int = Field(default=0, ge=0)
        """Decides which digits are whose, and every image."""

    config: Config

    def write(self, directory: Path) -> RawDataset:
        """Make folders `train` and `val` of JPEG files, their COCO JSONs and ATTRIBUTION."""
        train, val = materials(self.config.seed)
        (directory / "ATTRIBUTION").write_text(ATTRIBUTION, encoding="utf-8")
        with progress("digits", total=self.config.train + self.config.val, unit="image") as advance:
            return RawDataset(
                self._write_split(directory / "train", self.config.train, train, 0, advance),
                self._write_split(directory / "val", self.config.val, val, 1, advance),
                attribution=ATTRIBUTION,
            )

    def _write_split(
        self, folder: Path, count: int, material: Material, number: int, advance: Callable[..., None]
    ) -> RawSplit:
        folder.mkdir()
        document = empty_document()
        for index in range(count):
            rng = np.random.default_rng([self.config.seed, number, index])
            image, boxes_xywh, values = draw(material, self.config.size, rng)
            file_name = f"{index + 1:06d}.jpg"
            image.save(folder / file_name, quality=JPEG_QUALITY)
            _add(document, file_name, self.config.size, boxes_xywh, values)
            advance(1)
        annotations = folder.with_name(f"digits_{folder.name}.json")
        annotations.write_text(json.dumps(document), encoding="utf-8")
        return RawSplit(folder, annotations)


def materials(seed: int) -> tuple[Material, Material]:
    """What train and val are made of; they have no digit and no pixel of a photograph in common."""
    # Imported here: it takes a second, and planning a run need not.
    from sklearn.datasets import load_digits, load_sample_images

    digits = load_digits()
    images_D88 = np.round(digits.images * (255 / 16)).astype(np.uint8)
    order = np.random.default_rng([seed]).permutation(len(images_D88))
    cut = round(len(order) * TRAIN_DIGITS)
    photos = load_sample_images().images
    return (
        Material(images_D88[order[:cut]], digits.target[order[:cut]], _columns(photos, 0, TRAIN_COLUMNS)),
        Material(images_D88[order[cut:]], digits.target[order[cut:]], _columns(photos, TRAIN_COLUMNS, None)),
    )


def _columns(photos: list[NDArray[np.uint8]], start: int, stop: int | None) -> tuple[Image.Image, ...]:
    return tuple(Image.fromarray(np.ascontiguousarray(photo[:, start:stop])) for photo in photos)


def draw(
    material: Material, size: int, rng: np.random.Generator
) -> tuple[Image.Image, list[tuple[int, int, int, int]], list[int]]:
    """One image (size x size), its boxes as (x, y, width, height) in whole pixels and the digit on each plate."""
    pixels_HW3 = _background(material.photos, size, rng)
    boxes: list[tuple[int, int, int, int]] = []
    values: list[int] = []
    for _ in range(rng.integers(PLATES[0], PLATES[1], endpoint=True)):
        box = _free_place(boxes, size, rng)
        if box is None:  # no room was found for it
            continue
        which = int(rng.integers(len(material.values_D)))
        x, y, width, height = box
        pixels_HW3[y : y + height, x : x + width] = _plate(material.digits_D88[which], width, height, rng)
        boxes.append(box)
        values.append(int(material.values_D[which]))
    return Image.fromarray(np.round(pixels_HW3.clip(0, 255)).astype(np.uint8)), boxes, values


def _background(photos: tuple[Image.Image, ...], size: int, rng: np.random.Generator) -> NDArray[np.float32]:
    photo = photos[int(rng.integers(len(photos)))]
    side = int(rng.integers(CROP_PX[0], CROP_PX[1], endpoint=True))
    x, y = int(rng.integers(photo.width - side + 1)), int(rng.integers(photo.height - side + 1))
    crop = photo.crop((x, y, x + side, y + side)).resize((size, size), Image.Resampling.BILINEAR)
    light = np.float32(rng.uniform(*BRIGHTNESS))
    noise = rng.standard_normal((size, size, 3), dtype=np.float32) * np.float32(NOISE_SIGMA)
    return np.asarray(crop, np.float32) * light + noise


def _free_place(
    boxes: list[tuple[int, int, int, int]], size: int, rng: np.random.Generator
) -> tuple[int, int, int, int] | None:
    """A box that overlaps none of the others, or None when a hundred draws found no place."""
    side = math.exp(rng.uniform(math.log(PLATE_PX[0]), math.log(PLATE_PX[1])))
    stretch = math.exp(rng.uniform(-LOG_ASPECT, LOG_ASPECT) / 2)
    width, height = round(side * stretch), round(side / stretch)
    for _ in range(100):
        x, y = int(rng.integers(size - width + 1)), int(rng.integers(size - height + 1))
        if all(x + width <= a or a + w <= x or y + height <= b or b + h <= y for a, b, w, h in boxes):
            return x, y, width, height
    return None


def _plate(digit_88: NDArray[np.uint8], width: int, height: int, rng: np.random.Generator) -> NDArray[np.float32]:
    plate, ink = rng.uniform(*PLATE_LEVEL, 3), rng.uniform(*INK_LEVEL, 3)
    while plate.mean() - ink.mean() <= MIN_CONTRAST:
        plate, ink = rng.uniform(*PLATE_LEVEL, 3), rng.uniform(*INK_LEVEL, 3)
    left, top = round(width * MARGIN), round(height * MARGIN)
    inner = (width - 2 * left, height - 2 * top)
    cover_HW = np.zeros((height, width), np.float32)
    scaled = Image.fromarray(digit_88).resize(inner, Image.Resampling.BICUBIC)
    cover_HW[top : top + inner[1], left : left + inner[0]] = np.asarray(scaled, np.float32) / 255
    return (plate + cover_HW[..., None] * (ink - plate)).astype(np.float32)


def empty_document() -> dict[str, Any]:
    """A COCO document with the ten classes; ids begin at 1, for pycocotools takes annotation 0 for no match."""
    return {
        "info": {"description": "plate digits", "attribution": ATTRIBUTION},
        "images": [],
        "annotations": [],
        "categories": [{"id": digit + 1, "name": str(digit), "supercategory": "digit"} for digit in range(10)],
    }


def _add(
    document: dict[str, Any], file_name: str, size: int, boxes: list[tuple[int, int, int, int]], values: list[int]
) -> None:
    image_id = len(document["images"]) + 1
    document["images"].append({"id": image_id, "file_name": file_name, "width": size, "height": size})
    for box, value in zip(boxes, values, strict=True):
        document["annotations"].append(
            {
                "id": len(document["annotations"]) + 1,
                "image_id": image_id,
                "category_id": value + 1,
                "bbox": list(box),
                "area": box[2] * box[3],
                "iscrowd": 0,
            }
        )
