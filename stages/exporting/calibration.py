"""Training images set apart for quantisation: some to calibrate on, others to judge on; none of them a validation image.

Images are compared by their pixels, as a copy may have another name, another folder or another compression header.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploy.image import ImageSpec, decode
from pipeline.errors import UserError
from pipeline.log import logger, progress
from stages.artifacts.dataset import Dataset
from stages.data.coco import CocoSplit


@dataclass(frozen=True)
class Picture:
    """A training image: its record in the annotations, its file, the sha256 of its upright RGB pixels and their shape."""

    record: dict[str, Any]
    file: Path
    sha256: str


@dataclass(frozen=True)
class SetApart:
    """Drawn by a seed; no two of all of them show the same pixels, and none those of a validation image."""

    calibration: tuple[Picture, ...]
    held_out: tuple[Picture, ...]
    compared_with: int
    """Validation images whose pixels were compared."""
    left_out: tuple[str, ...]
    """Training images that were drawn and are the same as a validation image, as `train name = val name`."""

    @property
    def sha256(self) -> str:
        """Of the calibration set, whatever its order."""
        return hashlib.sha256("".join(sorted(one.sha256 for one in self.calibration)).encode()).hexdigest()

    def write(self, file: Path) -> None:
        """All names and hashes as JSON."""
        lists = {
            name: [{"file_name": one.record["file_name"], "sha256": one.sha256} for one in pictures]
            for name, pictures in (("calibration", self.calibration), ("held_out", self.held_out))
        }
        told = {"sha256": self.sha256, "validation_images_compared": self.compared_with, "left_out": self.left_out}
        file.write_text(json.dumps(told | lists, indent=1) + "\n", encoding="utf-8")


def set_apart(data: Dataset, calibration: int, held_out: int, seed: int) -> SetApart:
    """Draw `calibration` and `held_out` training images. Raises UserError where there are too few."""
    document = json.loads(data.annotations("train").read_bytes())
    folder, records = data.folder("train"), document["images"]
    validation = CocoSplit(data.folder("val"), data.annotations("val")).files
    with progress("compare", len(validation), "image") as advance:
        taken: dict[str, str] = {}
        for file in validation:
            taken[pixels(file)] = file.name
            advance(1)
    compared = len(validation)
    drawn: list[Picture] = []
    left_out: list[str] = []
    for index in np.random.default_rng(seed).permutation(len(records)):
        if len(drawn) == calibration + held_out:
            break
        record = records[int(index)]
        picture = Picture(record, folder / record["file_name"], pixels(folder / record["file_name"]))
        known = taken.get(picture.sha256)
        if known is None:
            drawn.append(picture)
            taken[picture.sha256] = ""
        elif known:
            left_out.append(f"{record['file_name']} = {known}")
    if len(drawn) < calibration + held_out:
        raise UserError(
            f"quantize: {calibration} images to calibrate on and {held_out} held out are asked for, {len(drawn)} of "
            f"{len(records)} training images differ from one another and from all validation images; ask for fewer"
        )
    if left_out:
        logger.warning("%d training images are validation images too and are not used: %s", len(left_out), left_out[0])
    return SetApart(tuple(drawn[:calibration]), tuple(drawn[calibration:]), compared, tuple(left_out))


def pixels(file: Path) -> str:
    """sha256 of an image's shape and upright RGB pixels."""
    array = np.asarray(decode(file))
    return hashlib.sha256(repr(array.shape).encode() + array.tobytes()).hexdigest()


def batches(pictures: Sequence[Picture], spec: ImageSpec, size: int = 4) -> Iterator[NDArray[np.uint8]]:
    """The images as a detector's input, (B, H, W, 3)."""
    for start in range(0, len(pictures), size):
        yield np.stack([spec.prepare(decode(one.file))[0] for one in pictures[start : start + size]])


def annotations_of(pictures: Sequence[Picture], data: Dataset, file: Path) -> None:
    """Write the COCO JSON of these training images alone."""
    document = json.loads(data.annotations("train").read_bytes())
    ids = {one.record["id"] for one in pictures}
    document["images"] = [one.record for one in pictures]
    document["annotations"] = [one for one in document["annotations"] if one["image_id"] in ids]
    file.write_text(json.dumps(document), encoding="utf-8")
