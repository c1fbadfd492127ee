"""Check a dataset, count it and fingerprint it: every image is opened once, every defect is refused or said."""

from __future__ import annotations

import hashlib
import json
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Annotated

from pydantic import Field

from pipeline.config import BaseConfig, Choice
from pipeline.log import logger
from stages.artifacts.dataset import Dataset, Split
from stages.data.classes import Classes
from stages.data.coco_check import CheckedDataset
from stages.data.coco_check import check as check_coco
from stages.data.coco_document import CocoDocument
from stages.data.source import RawSplit, Source

Pixels = Annotated[int, Field(ge=32)]


class Config(BaseConfig):
    """Which data, and the size at which detectors see it."""

    source: Choice[Source]
    """Where images and annotations come from: `coco` for your own files, `digits` for the built-in set."""
    size: Pixels | tuple[Pixels, Pixels] = 320
    """Canvas of the detectors in pixels: one number, or [height, width]. Images keep their ratio and are padded."""
    classes: Classes | None = None
    """Only these classes, in this order: `[car, person]`; `{vehicle: [car, truck]}` in the list makes one of several. Images
    that have none of them stay, as images where nothing is to be found. All classes of the data if not given."""

    @property
    def canvas(self) -> tuple[int, int]:
        """(height, width) of `size`."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size


def show(config: Config, out: Path) -> list[str]:
    """Draw training images with their boxes, before anything is run: what `pipeline check` shows."""
    if config.source.cls.made:
        return []
    with tempfile.TemporaryDirectory() as directory:
        raw = config.source.cls(config.source.config).write(Path(directory))
        # By its name alone: a picture is no part of the data, and the code that draws it none of the artifact's key.
        sheet = import_module("stages.data.contact_sheet")
        return list(sheet.contact_sheet(raw, config.canvas, config.classes, out.with_suffix(".png")))


def run(config: Config, directory: Path) -> Dataset:
    """Write train.json and val.json, complete and with the same categories, and say what was found."""
    raw = config.source.cls(config.source.config).write(directory)
    checked = check_coco(raw, config.classes)
    for name, document in (("train", checked.train), ("val", checked.val)):
        (directory / f"{name}.json").write_text(json.dumps(document), encoding="utf-8")
    for written in (raw.train.annotations, raw.val.annotations):
        if written.is_relative_to(directory):  # what the source made it from is in the checked file
            written.unlink()
    train = _split("train", checked.train, raw.train, directory)
    val = _split("val", checked.val, raw.val, directory)
    problems = (*raw.findings, *checked.findings)
    for finding in problems:
        logger.warning("%s", finding)
    logger.info("%s", _table(train, val))
    red, green, blue = (round(level) for level in checked.mean_rgb)
    height, width = config.canvas
    return Dataset(
        classes=tuple(category["name"] for category in checked.train["categories"]),
        category_ids=tuple(category["id"] for category in checked.train["categories"]),
        train=train,
        val=val,
        height=height,
        width=width,
        pad_rgb=(red, green, blue),
        fingerprint=_fingerprint(checked),
        problems=problems,
        attribution=raw.attribution,
    )


def _split(name: str, document: CocoDocument, raw: RawSplit, directory: Path) -> Split:
    inside = raw.images.is_relative_to(directory)
    names = {category["id"]: category["name"] for category in document["categories"]}
    counts = dict.fromkeys(names.values(), 0)
    for annotation in document["annotations"]:
        if not annotation["iscrowd"]:
            counts[names[annotation["category_id"]]] += 1
    return Split(
        images=str(raw.images.relative_to(directory) if inside else raw.images),
        annotations=f"{name}.json",
        image_count=len(document["images"]),
        box_count=sum(counts.values()),
        boxes_per_class=counts,
    )


def _fingerprint(checked: CheckedDataset) -> str:
    """The same for the same images and annotations, wherever they lie."""
    content = {"train": checked.train, "val": checked.val, "digests": checked.digests}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _table(train: Split, val: Split) -> str:
    rows = [("class", "train", "val")]
    rows += [(name, f"{count:,}", f"{val.boxes_per_class[name]:,}") for name, count in train.boxes_per_class.items()]
    rows += [("boxes", f"{train.box_count:,}", f"{val.box_count:,}")]
    rows += [("images", f"{train.image_count:,}", f"{val.image_count:,}")]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(f"{name:<{widths[0]}}  {a:>{widths[1]}}  {b:>{widths[2]}}" for name, a, b in rows)
