"""A first config for a folder of COCO data: finds the annotation files and their images, and says what it found.

`pipeline init FOLDER` calls `write`. Layouts it knows are those where the names say which split a file is of, as
annotations/instances_train2017.json + train2017/, annotations/instances_val.json + images/, train/_annotations.coco.json
beside its images; or a single file, which is then divided.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Literal

from pipeline.errors import UserError
from stages.data.starter_config import CONFIG

DEPTH = 4  # folders below the given one that are looked into
PROBED = 50  # images of a file that are looked for
LONG_SIDE_PX = 320  # small enough for a CPU
STRIDE = 32  # canvas sides are multiples of it
VAL_FRACTION = 0.2
WORDS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}
SplitName = Literal["train", "val"]


@dataclass(frozen=True)
class Annotations:
    """What is needed of a COCO file with boxes: the whole of a large one takes gigabytes, and there may be several."""

    file: Path
    split: str
    """What its name, or else its folder's, says: train, val, test or nothing."""
    names: tuple[str, ...]
    """File names of its first images."""
    images: int
    boxes: int
    classes: tuple[str, ...]
    sizes: frozenset[tuple[int, int]]
    """The (height, width) of its images, as far as they are given."""

    def summary(self) -> str:
        """Counts, for a message."""
        return f"{self.images:,} images, {self.boxes:,} boxes"


def write(
    folder: Path,
    out: Path,
    train_images: Path | None = None,
    train_annotations: Path | None = None,
    val_images: Path | None = None,
    val_annotations: Path | None = None,
) -> list[str]:
    """Write a config for the data in `folder` to `out`. What the other arguments name is not looked for.

    Returns lines that say what was found. Raises UserError with everything that was not found, or found twice, and
    when `out` exists.
    """
    if out.exists():
        raise UserError(f"init: {out} exists; name another file, or remove it")
    if not folder.is_dir():
        raise UserError(f"init: no folder {folder}; give the one that holds images and COCO JSON files")
    problems: list[str] = []
    found = list(_annotation_files(folder))
    train = _choose(found, "train", train_annotations, folder, problems)
    rest = [entry for entry in found if train is None or entry.file != train.file]
    val = _choose(rest, "val", val_annotations, folder, problems)
    train_folder = _image_folder(train, train_images, folder, "train", problems)
    val_folder = _image_folder(val, val_images, folder, "val", problems)
    if val is None and val_images is not None:
        problems.append("init: --val-images is given, but no validation annotations; give --val-annotations too")
    if problems or train is None or train_folder is None:
        raise UserError("\n".join(problems))
    height, width = canvas(train.sizes)
    source, said = _source(train, train_folder, val, val_folder)
    text = Template(CONFIG).substitute(file=out, folder=folder, source=source, height=height, width=width)
    partial = out.with_name(f".{out.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(out)
    shown = ", ".join(train.classes[:10]) + (", ..." if len(train.classes) > 10 else "")
    return [
        *said,
        f"classes: {len(train.classes)} ({shown})",
        f"canvas: {height} x {width} (height x width); larger finds smaller objects and takes longer",
        f"written: {out}; next: pipeline check {out}, then: pipeline run {out}",
    ]


def _source(
    train: Annotations, train_folder: Path, val: Annotations | None, val_folder: Path | None
) -> tuple[str, list[str]]:
    """The lines of the config's source, and what to say of it."""

    def files(entry: Annotations, images: Path) -> str:  # JSON strings are YAML strings, whatever is in a path
        return f"{{images: {json.dumps(str(images))}, annotations: {json.dumps(str(entry.file))}}}"

    lines = [f"train: {files(train, train_folder)}"]
    said = [f"training: {train.file}, images in {train_folder}: {train.summary()}"]
    if val is not None and val_folder is not None:
        lines.append(f"val: {files(val, val_folder)}")
        said.append(f"validation: {val.file}, images in {val_folder}: {val.summary()}")
    else:
        lines.append(
            f"val_fraction: {VAL_FRACTION}  # drawn by `seed`; images of one scene or video may land on both sides"
        )
        said.append(
            f"validation: no file found for it, so {VAL_FRACTION:.0%} of the training images are set aside "
            "(val_fraction); better: images taken apart, by --val-annotations and --val-images"
        )
    return "\n      ".join(lines), said


def _annotation_files(folder: Path) -> Iterator[Annotations]:
    for directory in _folders(folder):
        for file in sorted(directory.glob("*.json")):
            entry = _read(file, _split_word(file.relative_to(folder)))
            if entry is not None:
                yield entry


def _folders(folder: Path) -> Iterator[Path]:
    """The folder and those below it, the hidden ones left out; names only, for there may be a million images."""
    for root, names, _ in os.walk(folder):
        depth = len(Path(root).relative_to(folder).parts)
        names[:] = sorted(name for name in names if not name.startswith(".")) if depth < DEPTH else []
        yield Path(root)


def _read(file: Path, split: str) -> Annotations | None:
    """Look at a file. None where it is not COCO with boxes."""
    try:
        document = json.loads(file.read_bytes())
        images, annotations = document["images"], document["annotations"]
        if not annotations or not all("bbox" in annotation for annotation in annotations[:PROBED]):
            return None
        return Annotations(
            file,
            split,
            names=tuple(str(image["file_name"]) for image in images[:PROBED]),
            images=len(images),
            boxes=len(annotations),
            classes=tuple(str(category["name"]) for category in document["categories"]),
            sizes=frozenset((i["height"], i["width"]) for i in images if i.get("height") and i.get("width")),
        )
    except (OSError, ValueError, TypeError, LookupError, AttributeError):  # a JSON of any other shape
        return None


def _split_word(relative: Path) -> str:
    """The split in a path's words, those of the file before those of its folders: `train2017` is train."""
    for part in reversed(relative.parts):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in WORDS:
                return WORDS[word]
    return ""


def _choose(
    found: Sequence[Annotations], split: SplitName, given: Path | None, folder: Path, problems: list[str]
) -> Annotations | None:
    """The file of a split. None for val, where there is none, is no problem: train is divided then."""
    option = f"--{split}-annotations"
    if given is not None:
        entry = _read(given, split)
        if entry is None:
            problems.append(f"init: {option} {given}: not a COCO JSON with boxes; give an instances file")
        return entry
    fitting = [entry for entry in found if entry.split == split]
    if not fitting and split == "train":  # a single file often has no split in its name
        fitting = [entry for entry in found if not entry.split]
    if len(fitting) > 1:  # COCO has keypoints beside instances
        fitting = [entry for entry in fitting if entry.file.name.startswith("instances")] or fitting
    if len(fitting) > 1:
        names = ", ".join(str(entry.file) for entry in fitting)
        problems.append(f"init: {len(fitting)} files could be the {split} annotations ({names}); name one by {option}")
        return None
    if not fitting and split == "train":
        others = ", ".join(f"{entry.file} ({entry.split})" for entry in found)
        seen = (
            f"there are only: {others}" if others else "a COCO JSON has images, annotations with bbox, and categories"
        )
        problems.append(f"init: no training annotations below {folder}; {seen}; name the file by {option}")
    return fitting[0] if fitting else None


def _image_folder(
    entry: Annotations | None, given: Path | None, folder: Path, split: SplitName, problems: list[str]
) -> Path | None:
    """The folder that the file's names start from: where most of its first images are."""
    if entry is None:
        return None

    def present(directory: Path) -> int:
        return sum((directory / name).is_file() for name in entry.names)

    def says(directory: Path) -> bool:
        return directory.is_relative_to(folder) and _split_word(directory.relative_to(folder)) == split

    option = f"--{split}-images"
    if given is not None:
        if not present(given):
            problems.append(
                f"init: {option} {given}: has none of the images of {entry.file} ({', '.join(entry.names[:3])})"
            )
        return given
    # Where several have as many, as 000001.jpg of train and of val: the one named as the split, then the file's own.
    candidates = sorted(
        {*_folders(folder), entry.file.parent, entry.file.parent.parent},
        key=lambda path: (-present(path), not says(path), path != entry.file.parent, len(path.parts), path),
    )
    if not present(candidates[0]):
        names = ", ".join(entry.names[:3]) or "it lists none"
        problems.append(
            f"init: the images of {entry.file} ({names}) are in none of the {len(candidates)} folders below {folder}; "
            f"name their folder by {option}"
        )
        return None
    return candidates[0]


def canvas(sizes: Collection[tuple[int, int]]) -> tuple[int, int]:
    """The (height, width) that holds images of these sizes with little padding, the long side at most 320 px.

    Square where no sizes are known. Images smaller than that are not enlarged, but for the multiple of 32.
    """
    long = min(LONG_SIDE_PX, max((max(size) for size in sizes), default=LONG_SIDE_PX))
    fitted = [(height * long / max(height, width), width * long / max(height, width)) for height, width in sizes]
    height, width = (math.ceil(max(sides) / STRIDE) * STRIDE for sides in zip(*fitted or [(long, long)], strict=True))
    return height, width
