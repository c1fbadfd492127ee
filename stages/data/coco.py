"""CocoSplit: images and what is to be learnt on them, read from a checked COCO JSON.

Shapes: N boxes of one image, in pixels of the upright image as (x1, y1, x2, y2).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from deploy.errors import DeployError
from pipeline.errors import UserError
from stages.data.decode import decode_pixels


class Sample(NamedTuple):
    """One image with its training targets."""

    pixels_HWC: NDArray[np.uint8]
    """RGB. Whoever changes them takes a copy: they may be those of a cache."""
    size: tuple[int, int]
    """(height, width) of the image in its file, upright, which boxes refer to."""
    boxes_N4: NDArray[np.float32]
    """Clipped to the image, each with an area."""
    labels_N: NDArray[np.int64]
    """i is the i-th category of the file, by id."""
    image_id: int


class CocoSplit:
    """The images of one file, in its order. Crowds and boxes without an area inside the image are no targets.

    Boxes are held in flat arrays: worker processes would copy millions of small objects page by page.
    """

    def __init__(self, folder: Path, annotations: Path) -> None:
        """Read `train.json` or `val.json` of a `Dataset` artifact; `folder` is where its file names start."""
        document = json.loads(annotations.read_bytes())
        images = document["images"]
        category_ids = sorted(category["id"] for category in document["categories"])
        labels = {category_id: label for label, category_id in enumerate(category_ids)}
        row = {image["id"]: number for number, image in enumerate(images)}
        found = [annotation for annotation in document["annotations"] if not annotation["iscrowd"]]
        owner = np.asarray([row[a["image_id"]] for a in found], np.int64)
        boxes = np.asarray([a["bbox"] for a in found], np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        limits = np.asarray([[i["width"], i["height"]] * 2 for i in images], np.float64).reshape(-1, 4)
        boxes = boxes.clip(0, limits[owner])
        keep = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
        order = np.flatnonzero(keep)[np.argsort(owner[keep], kind="stable")]
        self.folder = folder
        self.classes = len(category_ids)
        self.image_ids = [int(image["id"]) for image in images]
        self.sizes_N2 = limits[:, [1, 0]].astype(np.int64)  # (height, width) of each image
        self._names = np.asarray([image["file_name"] for image in images], dtype=np.str_)
        self._boxes = boxes[order].astype(np.float32)
        self._labels = np.asarray([labels[a["category_id"]] for a in found], np.int64)[order]
        self._starts = np.searchsorted(owner[order], np.arange(len(images) + 1))

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> Sample:
        return self.sample(index)

    @property
    def files(self) -> list[Path]:
        """Paths of the images."""
        return [self.folder / name for name in self._names.tolist()]

    def pixels(self, index: int, canvas_HWC: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
        """Decode one image; at the top of the canvas, if one is given on which it needs no other row length, so that nobody
        has to copy it there. Raises DeployError, naming the file, where it can no longer be read or has another size than
        it had when it was checked: its boxes would lie elsewhere."""
        file, size = self.folder / str(self._names[index]), tuple(self.sizes_N2[index].tolist())
        buffer_HWC = None
        if canvas_HWC is not None and size[0] <= canvas_HWC.shape[0] and size[1] == canvas_HWC.shape[1]:
            buffer_HWC = canvas_HWC[: size[0]]
        pixels_HWC = decode_pixels(file, buffer_HWC)
        if pixels_HWC.shape[:2] != size:
            raise DeployError(
                f"{file}: the image has {pixels_HWC.shape[0]} x {pixels_HWC.shape[1]} (height x width) pixels, it had "
                f"{size[0]} x {size[1]} when the dataset was checked; put it back, or run the dataset stage with --force"
            )
        return pixels_HWC

    def sample(self, index: int, pixels_HWC: NDArray[np.uint8] | None = None) -> Sample:
        """One image with its targets; decoded, unless its pixels are given, which may be those of the resized image."""
        height, width = self.sizes_N2[index].tolist()
        pixels_HWC = self.pixels(index) if pixels_HWC is None else pixels_HWC
        own = slice(self._starts[index], self._starts[index + 1])
        return Sample(pixels_HWC, (height, width), self._boxes[own], self._labels[own], self.image_ids[index])

    def subset(self, count: int, seed: int) -> Self:
        """Return `count` of the images, drawn by `seed` alone and in the file's order.

        Whoever asks for the same count and seed gets the same images. Raises UserError when there are not so many.
        """
        if not 0 < count <= len(self):
            raise UserError(f"images: {count} asked for, {self.folder} has {len(self)}; ask for 1 to {len(self)}")
        chosen = np.sort(np.random.default_rng(seed).permutation(len(self))[:count])
        part = type(self).__new__(type(self))
        part.folder, part.classes = self.folder, self.classes
        part.image_ids = [self.image_ids[index] for index in chosen]
        part.sizes_N2, part._names = self.sizes_N2[chosen], self._names[chosen]
        rows = [np.arange(self._starts[index], self._starts[index + 1]) for index in chosen]
        part._boxes, part._labels = self._boxes[np.concatenate(rows)], self._labels[np.concatenate(rows)]
        part._starts = np.cumsum([0] + [len(row) for row in rows], dtype=np.int64)
        return part
