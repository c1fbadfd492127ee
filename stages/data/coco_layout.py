"""Where COCO data lies in a folder: the annotation files and their images, for `pipeline init`.

Layouts it knows are those where the names say which split a file is of, as annotations/instances_train2017.json +
train2017/, annotations/instances_val.json + images/, train/_annotations.coco.json beside its images; or a single file,
which is then divided.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import UserError

DEPTH = 4  # folders below the given one that are looked into
PROBED = 50  # images of a file that are looked for
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


def settings(folder: Path, given: Mapping[str, Path | None]) -> dict[str, Any]:
    """Settings of the source `coco` for the data in a folder: `train`, and `val` where there is a file for it.

    What `given` names (`train_images`, `train_annotations`, `val_images`, `val_annotations`) is not looked for. Raises
    UserError with everything that was not found, or found twice.
    """
    problems: list[str] = []
    found = list(annotation_files(folder))
    train = _choose(found, "train", given.get("train_annotations"), folder, problems)
    rest = [entry for entry in found if train is None or entry.file != train.file]
    val = _choose(rest, "val", given.get("val_annotations"), folder, problems)
    train_folder = _image_folder(train, given.get("train_images"), folder, "train", problems)
    val_folder = _image_folder(val, given.get("val_images"), folder, "val", problems)
    if val is None and given.get("val_images") is not None:
        problems.append("init: --val-images is given, but no validation annotations; give --val-annotations too")
    if problems or train is None or train_folder is None:
        raise UserError("\n".join(problems))
    made = {"train": {"images": str(train_folder), "annotations": str(train.file)}}
    if val is not None and val_folder is not None:
        made["val"] = {"images": str(val_folder), "annotations": str(val.file)}
    return made


def annotation_files(folder: Path) -> Iterator[Annotations]:
    """The COCO files with boxes in a folder and below it."""
    for directory in folders(folder):
        for file in sorted(directory.glob("*.json")):
            entry = _read(file, split_word(file.relative_to(folder)))
            if entry is not None:
                yield entry


def folders(folder: Path) -> Iterator[Path]:
    """The folder and those below it, the hidden ones left out; names only, for there may be a million images."""
    for root, names, _ in os.walk(folder):
        depth = len(Path(root).relative_to(folder).parts)
        names[:] = sorted(name for name in names if not name.startswith(".")) if depth < DEPTH else []
        yield Path(root)


def _read(file: Path, split: str) -> Annotations | None:
    """Look at a file. None where it is not COCO with boxes; what is wrong in one that is, the source says."""
    try:
        document = json.loads(file.read_bytes())
        images, annotations, _ = document["images"], document["annotations"], document["categories"]
        if annotations and not any("bbox" in one or _mask(one) for one in annotations[:PROBED]):
            return None
        return Annotations(
            file,
            split,
            names=tuple(str(image["file_name"]) for image in images[:PROBED] if "file_name" in image),
        )
    except (OSError, ValueError, TypeError, LookupError, AttributeError):  # a JSON of any other shape
        return None


def _mask(annotation: Mapping[str, Any]) -> bool:
    """Whether it has no box, and a mask that gives one; keypoints come with boxes, captions with neither."""
    return bool(annotation.get("segmentation"))


def split_word(relative: Path) -> str:
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
        return directory.is_relative_to(folder) and split_word(directory.relative_to(folder)) == split

    option = f"--{split}-images"
    if given is not None:
        if not present(given):
            problems.append(
                f"init: {option} {given}: has none of the images of {entry.file} ({', '.join(entry.names[:3])})"
            )
        return given
    # Where several have as many, as 000001.jpg of train and of val: the one named as the split, then the file's own.
    candidates = sorted(
        {*folders(folder), entry.file.parent, entry.file.parent.parent},
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
