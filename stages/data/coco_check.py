"""Everything that is wrong with a COCO dataset, found in one pass: refused, or handled and said.

    RawDataset --parse--> two documents --check--> CheckedDataset (the documents completed, what was found) or UserError

The checked files keep every box as it was annotated, so that AP is that of the user's own file: a box of zero size
stays something no detection can match, a crowd swallows detections without being asked for. Training reads the same
files through `CocoSplit`, which leaves crowds and empty boxes out and clips the others to the image.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ImageStat

from deploy.errors import DeployError
from deploy.image import decode
from pipeline.errors import UserError
from pipeline.log import progress
from stages.artifacts.dataset import SplitName
from stages.data.classes import Classes, keep, selected
from stages.data.coco_document import CocoDocument, parse, sentence
from stages.data.source import RawDataset, RawSplit

TOLERANCE_PX = 0.5  # by which a box may leave the image unmentioned: annotation tools round


@dataclass(frozen=True)
class Picture:
    """What one image file holds: sha256 of the file and of its pixels, upright (height, width), sum of its colours."""

    digest: str
    pixels: str
    size: tuple[int, int]
    sum_rgb: tuple[float, float, float]


@dataclass(frozen=True)
class CheckedDataset:
    """Two documents with the same categories, sorted by id, and with complete records; what was found on the way."""

    train: CocoDocument
    val: CocoDocument
    digests: dict[SplitName, dict[int, str]]
    """Of each split: image id to the sha256 of the file."""
    mean_rgb: tuple[float, float, float]
    """Over all pixels of the training images."""
    findings: tuple[str, ...]


@dataclass
class _Findings:
    """`refused`: what makes the dataset unusable; `handled`: what is dealt with, and how."""

    refused: list[str] = field(default_factory=list)
    handled: list[str] = field(default_factory=list)

    def refuse(self, where: str, what: str, items: Sequence[object], mend: str) -> None:
        if items:
            self.refused.append(sentence(where, what, items, mend))

    def handle(self, where: str, what: str, items: Sequence[object], how: str) -> None:
        if items:
            self.handled.append(sentence(where, what, items, how))

    def raise_refused(self) -> None:
        if self.refused:
            raise UserError("\n".join(self.refused))


def check(raw: RawDataset, classes: Classes | None = None) -> CheckedDataset:
    """Check both splits, decoding every image; with `classes`, they have these alone.

    Raises UserError with everything that is refused, one line each.
    """
    found = _Findings()
    splits: dict[SplitName, RawSplit] = {"train": raw.train, "val": raw.val}
    documents = {name: _parsed(split.annotations, found) for name, split in splits.items()}
    found.raise_refused()
    _check_documents(documents, found)
    if classes and not found.refused:
        _select(documents, classes, found)
    pictures = {name: _check_images(name, documents[name], split.images, found) for name, split in splits.items()}
    _check_shared_images(documents, pictures, found)
    found.raise_refused()
    categories = sorted(documents["train"]["categories"], key=lambda category: category["id"])
    for name, document in documents.items():
        document["categories"] = categories
        _complete(name, document, pictures[name], found)
        _check_boxes(name, document, found)
        _check_unused(name, document, found)
    return CheckedDataset(
        train=documents["train"],
        val=documents["val"],
        digests={name: {i: picture.digest for i, picture in pictures[name].items()} for name in splits},
        mean_rgb=_mean_rgb(pictures["train"].values()),
        findings=tuple(found.handled),
    )


def check_documents(documents: Mapping[SplitName, CocoDocument]) -> None:
    """Check what can be without the images: ids, references, categories. Raises UserError as `check` does."""
    found = _Findings()
    _check_documents(documents, found)
    found.raise_refused()


def _check_documents(documents: Mapping[SplitName, CocoDocument], found: _Findings) -> None:
    for name, document in documents.items():
        _check_references(name, document, found)
    _check_categories(documents["train"], documents["val"], found)


def _parsed(file: Path, found: _Findings) -> CocoDocument:
    try:
        return parse(file)
    except UserError as error:
        found.refused.append(str(error))
        return {"images": [], "annotations": [], "categories": []}


def _repeated(values: Iterable[Any]) -> list[Any]:
    return [value for value, count in Counter(values).items() if count > 1]


def _check_references(name: str, document: CocoDocument, found: _Findings) -> None:
    images, annotations, categories = document["images"], document["annotations"], document["categories"]
    if not images:
        found.refused.append(f"{name}: no images; give a file that lists some")
    elif all(a.get("iscrowd") for a in annotations):
        found.refused.append(f"{name}: no boxes on its {len(images)} images; give a file with annotations")
    unique = "make them unique"
    found.refuse(name, "duplicate image ids", _repeated(image["id"] for image in images), unique)
    found.refuse(name, "duplicate annotation ids", _repeated(a["id"] for a in annotations), unique)
    found.refuse(name, "duplicate category ids", _repeated(c["id"] for c in categories), unique)
    found.refuse(name, "duplicate category names", _repeated(c["name"] for c in categories), "merge or rename them")
    listed, known = {image["id"] for image in images}, {c["id"] for c in categories}
    lost = [f"annotation {a['id']}: image {a['image_id']}" for a in annotations if a["image_id"] not in listed]
    found.refuse(name, "annotations of unknown images", lost, "list the images, or remove the annotations")
    odd = [f"annotation {a['id']}: category {a['category_id']}" for a in annotations if a["category_id"] not in known]
    found.refuse(name, "annotations of unknown categories", odd, "list the categories, or remove the annotations")


def _check_categories(train: CocoDocument, val: CocoDocument, found: _Findings) -> None:
    """Val may list fewer categories than train, but none that train does not know by the same id and name."""
    known = {c["id"]: c["name"] for c in train["categories"]}
    differing = [
        f"{c['id']} '{c['name']}', in train {known[c['id']]!r}" if c["id"] in known else f"{c['id']} '{c['name']}'"
        for c in val["categories"]
        if known.get(c["id"]) != c["name"]
    ]
    found.refuse("val", "categories that train does not have", differing, "give both files the same categories")


def _select(documents: dict[SplitName, CocoDocument], classes: Classes, found: _Findings) -> None:
    """Keep these classes; whoever is left out is counted. A split that has no boxes any more is refused."""
    try:
        categories, ids = selected(documents["train"]["categories"], classes)
    except UserError as error:
        found.refused.append(str(error))
        return
    for name, document in documents.items():
        if dropped := keep(document, ids):
            counts = [f"{count} {old}" for old, count in dropped.most_common()]
            found.handled.append(
                f"{name}: {dropped.total()} boxes of classes that are not asked for ({', '.join(counts)}); left out, "
                "their images stay"
            )
        document["categories"] = categories
        if not any(not annotation.get("iscrowd") for annotation in document["annotations"]):
            names = ", ".join(category["name"] for category in categories)
            found.refused.append(f"{name}: no boxes of {names}; set `classes` to some that are there")


def _check_images(name: str, document: CocoDocument, folder: Path, found: _Findings) -> dict[int, Picture]:
    """Decode every image in threads. Returns those that could be read, by image id."""
    images = document["images"]
    files = [folder / image["file_name"] for image in images]
    missing = [image["file_name"] for image, file in zip(images, files, strict=True) if not file.is_file()]
    found.refuse(name, f"images missing in {folder}", missing, "put them there, or remove their entries")
    looked: dict[int, Picture] = {}
    unreadable, wrong_size = [], []
    with progress(f"check {name}", total=len(files), unit="image") as advance, _pool() as pool:
        for image, picture in zip(images, pool.map(look, files), strict=True):
            advance(1)
            if isinstance(picture, Picture):
                looked[image["id"]] = picture
                size = (image.get("height", picture.size[0]), image.get("width", picture.size[1]))
                if size != picture.size:
                    wrong_size.append(_size_example(image["file_name"], size, picture.size))
            elif picture:
                unreadable.append(f"{image['file_name']}: {picture}")
    found.refuse(name, "unreadable images", unreadable, "replace the files, or remove their entries")
    found.refuse(
        name,
        "images whose size is not the one in the annotations",
        wrong_size,
        "correct width and height, and the boxes if they were drawn on another size or before the rotation",
    )
    return looked


@contextmanager
def _pool() -> Iterator[ThreadPoolExecutor]:
    """Threads, for Pillow and hashlib let go of the interpreter while they work; Ctrl-C does not wait for the rest."""
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def look(file: Path) -> Picture | str:
    """What the file holds; or why it cannot be read, or nothing where it is missing, which has been said."""
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return ""
    except OSError as error:
        return str(error.strerror)
    try:
        image = decode(content)
    except DeployError as error:
        return str(error).removeprefix("image: ").partition(";")[0]
    red, green, blue = ImageStat.Stat(image).sum
    pixels = hashlib.sha256(f"{image.width} x {image.height} ".encode() + image.tobytes()).hexdigest()
    return Picture(hashlib.sha256(content).hexdigest(), pixels, (image.height, image.width), (red, green, blue))


def _size_example(file_name: str, given: tuple[int, int], real: tuple[int, int]) -> str:
    text = f"{file_name}: {given[1]} x {given[0]} given, is {real[1]} x {real[0]}"
    return f"{text} upright, that is after its EXIF rotation" if given == real[::-1] else text


def _check_shared_images(
    documents: dict[SplitName, CocoDocument], pictures: dict[SplitName, dict[int, Picture]], found: _Findings
) -> None:
    """By their pixels: an image that was saved again, or given other metadata, is the same image."""
    names: dict[SplitName, dict[str, list[str]]] = {"train": defaultdict(list), "val": defaultdict(list)}
    for split, by_digest in names.items():
        for image in documents[split]["images"]:
            if image["id"] in pictures[split]:
                by_digest[pictures[split][image["id"]].pixels].append(image["file_name"])
    both = [
        f"{names['train'][digest][0]} is {others[0]} of val"
        for digest, others in names["val"].items()
        if digest in names["train"]
    ]
    mend = "remove them from one: AP on images seen in training proves nothing"
    found.refuse("train and val", "images are in both", both, mend)
    for split, by_digest in names.items():
        twice = [" is ".join(same) for same in by_digest.values() if len(same) > 1]
        found.handle(split, "images are there more than once", twice, "kept")


def _complete(name: str, document: CocoDocument, pictures: dict[int, Picture], found: _Findings) -> None:
    """Fill in what COCO's tools expect and this file may leave out: sizes, areas, crowd flags, ids above 0, `info`."""
    document.setdefault("info", {})  # pycocotools copies it into its results
    unsized = [image["file_name"] for image in document["images"] if not {"width", "height"} <= image.keys()]
    found.handle(name, "images without width and height", unsized, "taken from the files")
    for image in document["images"]:
        image["height"], image["width"] = pictures[image["id"]].size
    without_area = [a["id"] for a in document["annotations"] if "area" not in a]
    found.handle(name, "annotations without area", without_area, "width x height of the box is taken")
    zero = [f"annotation of image {a['image_id']}" for a in document["annotations"] if a["id"] == 0]
    found.handle(
        name, "annotation has the id 0", zero, "all are renumbered from 1: pycocotools counts a match with 0 as none"
    )
    for number, annotation in enumerate(document["annotations"], start=1):
        _, _, width, height = annotation["bbox"]
        annotation.setdefault("area", max(0.0, width) * max(0.0, height))
        annotation.setdefault("iscrowd", 0)
        if zero:
            annotation["id"] = number


def _check_boxes(name: str, document: CocoDocument, found: _Findings) -> None:
    sizes = {image["id"]: (image["height"], image["width"]) for image in document["images"]}
    crowds, empty, crossing = [], [], []
    for annotation in document["annotations"]:
        height, width = sizes[annotation["image_id"]]
        x, y, w, h = annotation["bbox"]
        if annotation["iscrowd"]:
            crowds.append(f"annotation {annotation['id']}")
            continue
        text = f"annotation {annotation['id']}: [{x:g}, {y:g}, {w:g}, {h:g}] in {width} x {height}"
        if min(x + w, width) <= max(x, 0) or min(y + h, height) <= max(y, 0):
            empty.append(text)
        elif min(x, y, width - x - w, height - y - h) < -TOLERANCE_PX:
            crossing.append(text)
    found.handle(name, "boxes reach out of their image", crossing, "clipped for training, evaluated as annotated")
    found.handle(
        name,
        "boxes of zero size or wholly outside their image",
        empty,
        "not trained on; evaluated as COCO does, where each is an object that cannot be found and lowers AP",
    )
    found.handle(
        name,
        "crowd annotations",
        crowds,
        "not trained on; evaluated as COCO does, where detections inside a crowd count neither for nor against",
    )


def _check_unused(name: str, document: CocoDocument, found: _Findings) -> None:
    annotations = [a for a in document["annotations"] if not a["iscrowd"]]
    filled, used = {a["image_id"] for a in annotations}, {a["category_id"] for a in annotations}
    bare = [image["file_name"] for image in document["images"] if image["id"] not in filled]
    found.handle(name, "images without boxes", bare, "kept, as images where nothing is to be found")
    unused = [category["name"] for category in document["categories"] if category["id"] not in used]
    kept = "kept: detectors get an output that learns nothing" if name == "train" else "kept; they have no AP"
    found.handle(name, "categories without boxes", unused, kept)


def _mean_rgb(pictures: Iterable[Picture]) -> tuple[float, float, float]:
    listed = list(pictures)
    pixels = sum(picture.size[0] * picture.size[1] for picture in listed)
    red, green, blue = (np.asarray([picture.sum_rgb for picture in listed]).sum(axis=0) / pixels).tolist()
    return red, green, blue
