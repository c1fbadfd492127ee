"""Training and validation images that are apart: divided at random, and never through a group.

A group is what hangs together: the frames of one video, the images of one patient, one place, one day. Images of one
group are nearly the same image, and AP on those that resemble the training images is worth as little as AP on them.
"""

from __future__ import annotations

import csv
import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, field_validator, model_validator

from pipeline.config import BaseConfig, ExternalFile
from pipeline.errors import UserError
from pipeline.log import logger
from stages.data.coco_document import CocoDocument, sentence
from stages.data.source import RawDataset, RawSplit


class DivisionConfig(BaseConfig):
    """Settings of a source that has validation images of its own (its setting `val`), or divides the others."""

    val_fraction: float | None = Field(default=None, gt=0, lt=1)
    """Share of the images of `train` that is set aside for validation, where there are no others; give this or `val`."""
    seed: int = Field(default=0, ge=0)
    """Decides which images or groups `val_fraction` sets aside."""
    group_by: str | None = None
    """Regular expression on file names: images with the same match (of its first parentheses, if it has any) are one group,
    which is never on both sides; `^(video\\d+)_` groups video3_0001.jpg with video3_0002.jpg."""
    group_file: ExternalFile | None = None
    """The same, listed: a JSON object of file names and groups, or a CSV with the columns `file_name` and `group`."""

    @field_validator("group_by")
    @classmethod
    def _is_a_pattern(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except re.error as error:
            raise ValueError(f"{value!r} is no regular expression: {error}") from error
        return value

    @model_validator(mode="after")
    def _one_of_each(self) -> DivisionConfig:
        if (getattr(self, "val", None) is None) == (self.val_fraction is None):
            raise ValueError("give either `val` or `val_fraction`")
        if self.group_by is not None and self.group_file is not None:
            raise ValueError("give `group_by` or `group_file`, not both")
        return self

    @property
    def grouped(self) -> bool:
        """Whether images belong to groups."""
        return self.group_by is not None or self.group_file is not None


def check_inside(split: str, files: Sequence[Path], folder: Path) -> None:
    """Raise UserError where images do not lie in the folder of their source."""
    outside = [str(file) for file in files if not file.is_relative_to(folder)]
    if outside:
        mend = f"set folder to one that holds all of it: changes elsewhere would not be seen, folder is {folder}"
        raise UserError(sentence(split, "images lie outside of the folder", outside, mend))


def written(
    directory: Path,
    images: Path,
    train: CocoDocument,
    val: CocoDocument | None,
    config: DivisionConfig,
    findings: tuple[str, ...] = (),
) -> RawDataset:
    """Write both splits as COCO below `directory`; without `val`, `train` is divided. File names start from `images`.

    Raises UserError where a group is on both sides, an image belongs to none, or has a name that JSON cannot hold.
    """
    _check_names("train", train)
    if val is not None:
        _check_names("val", val)
        check_apart(train, val, config)
    parts = (train, val) if val is not None else divide(train, config)
    files = directory / "source_train.json", directory / "source_val.json"
    for file, part in zip(files, parts, strict=True):
        file.write_text(json.dumps(part), encoding="utf-8")
    return RawDataset(RawSplit(images, files[0]), RawSplit(images, files[1]), findings=findings)


def _check_names(split: str, document: CocoDocument) -> None:
    """Raise UserError where bytes of a name on disk are no UTF-8: Python stands surrogates in for them."""
    names = [image["file_name"] for image in document["images"]]
    odd = [ascii(name) for name in names if any("\ud800" <= character <= "\udfff" for character in name)]
    if odd:
        raise UserError(sentence(split, "images have names that are not UTF-8", odd, "rename them"))


def divide(document: CocoDocument, config: DivisionConfig) -> tuple[CocoDocument, CocoDocument]:
    """Split one document by images, or by groups, at random: what remains, and `val_fraction` of the images.

    As many whole groups are set aside as fit into the fraction, at least one. Raises UserError where there is one alone.
    """
    assert config.val_fraction is not None
    ids = sorted({image["id"] for image in document["images"]})
    groups = _groups(document, config)
    members: dict[object, list[int]] = defaultdict(list)
    for image_id in ids:
        members[groups.get(image_id, image_id)].append(image_id)
    if len(members) < 2:
        what = f"1 group, {next(iter(groups.values()))!r}" if groups else f"{len(ids)} images"
        raise UserError(f"val_fraction: {what}, which cannot be divided; give validation images of their own by `val`")
    names = list(members)
    wanted = max(1, round(len(ids) * config.val_fraction))
    chosen: set[int] = set()
    for place in np.random.default_rng(config.seed).permutation(len(names)):
        if len(chosen) + len(members[names[place]]) <= wanted:
            chosen.update(members[names[place]])
    if not chosen:  # every group is larger than what is wanted
        smallest: list[int] = min(members.values(), key=len)
        chosen.update(smallest)
    if len(chosen) == len(ids):
        chosen.discard(ids[0])
    if groups:
        count = len({groups[image_id] for image_id in chosen})
        logger.info("validation: %d of %d groups, %d of %d images", count, len(names), len(chosen), len(ids))
    return _part(document, chosen, inside=False), _part(document, chosen, inside=True)


def _part(document: CocoDocument, chosen: set[int], inside: bool) -> CocoDocument:
    return {
        "images": [image for image in document["images"] if (image["id"] in chosen) == inside],
        "annotations": [a for a in document["annotations"] if (a["image_id"] in chosen) == inside],
        "categories": document["categories"],
    }


def check_apart(train: CocoDocument, val: CocoDocument, config: DivisionConfig) -> None:
    """Raise UserError where a group has images in both."""
    sides = []
    for document in (train, val):
        groups = _groups(document, config)
        sides.append({groups[i["id"]]: i["file_name"] for i in document["images"]} if groups else {})
    both = [f"{group}: {name} and {sides[1][group]}" for group, name in sides[0].items() if group in sides[1]]
    if both:
        mend = "put all of a group on one side: AP on frames of a video that was trained on proves nothing"
        raise UserError(sentence("train and val", "groups are in both", both, mend))


def _groups(document: CocoDocument, config: DivisionConfig) -> dict[int, str]:
    """Image id to group; empty where no groups are asked for. Raises UserError naming the images that belong to none."""
    if not config.grouped:
        return {}
    listed = _read(config.group_file.path) if config.group_file else {}
    found: dict[int, str] = {}
    without = []
    for image in document["images"]:
        name = image["file_name"]
        group = _matched(config.group_by, name) if config.group_by is not None else _listed(listed, name)
        if group is None:
            without.append(name)
        else:
            found[image["id"]] = group
    if without:
        where = f"group_by: {config.group_by!r}" if config.group_by is not None else f"group_file: {config.group_file}"
        raise UserError(sentence(where, "images belong to no group", without, "every image needs one"))
    return found


def _matched(pattern: str, name: str) -> str | None:
    match = re.search(pattern, name)
    return match[match.re.groups and 1] if match else None


def _listed(groups: Mapping[str, Any], name: str) -> str | None:
    """The group of a file name as the dataset has it, or else of its last part."""
    group = groups.get(name, groups.get(Path(name).name))
    return None if group is None else str(group)


def _read(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8-sig")
        if file.suffix.lower() != ".csv":
            found = json.loads(text)
            if not isinstance(found, dict):
                raise ValueError("not an object")
            return found
        return {row["file_name"]: row["group"] for row in csv.DictReader(text.splitlines())}
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"group_file: {file} cannot be read ({type(error).__name__}: {error}); give a JSON object of file names and "
            "groups, or a CSV with the columns file_name and group"
        ) from error
