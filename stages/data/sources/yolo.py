"""YOLO text files: a data.yaml, and for every image a .txt with a line for each object.

    data.yaml: path, train, val (folders, list files, or several of them), names (a list, or numbers and names)
    images/train/a.jpg -> labels/train/a.txt, or else a.txt beside a.jpg
    a line: class x y width height (of the box: its centre), or class x1 y1 x2 y2 x3 y3 ... (a polygon, whose box is
    taken), all as fractions of the upright image; with kpt_shape in data.yaml, a box and keypoints, which are left out

The conventions are those that Ultralytics documents (https://docs.ultralytics.com/datasets/detect/).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from PIL import Image, UnidentifiedImageError

from pipeline.config import ExternalFolder
from pipeline.errors import UserError, did_you_mean
from pipeline.log import logger
from stages.data.coco_document import CocoAnnotation, CocoCategory, CocoDocument, CocoImage, sentence
from stages.data.division import DivisionConfig, check_inside, written
from stages.data.image_files import image_files
from stages.data.source import RawDataset, Source

TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange height and width
TOLERANCE = 0.01  # by which a fraction may leave 0 to 1: annotation tools round
Box = tuple[float, float, float, float]


class Line(NamedTuple):
    """One object: the number of its class, and its box as fractions of the image."""

    label: int
    box_xywh: Box


class Description(NamedTuple):
    """What a data.yaml says, its paths not yet resolved."""

    file: Path
    content: Mapping[str, Any]
    names: dict[int, str]

    def boxes_first(self) -> bool:
        """Whether lines hold keypoints after the box: then they are no polygons."""
        return "kpt_shape" in self.content


class Yolo(Source):
    """Folders as YOLO trainers have them."""

    class Config(DivisionConfig):
        """Where the files are."""

        folder: ExternalFolder
        """Folder that holds everything: images, labels and the YAML file."""
        data: str = "data.yaml"
        """The YAML file with the splits and the class names, below `folder`."""
        train: str = "train"
        """Key of the YAML file whose images are trained on."""
        val: str | None = None
        """Key of the YAML file whose images are validated on, mostly `val`; give this or `val_fraction`."""

    config: Config

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        return bool(_data_files(folder))

    @classmethod
    def settings(cls, folder: Path, given: Mapping[str, Path | None]) -> dict[str, Any]:
        """The YAML file and its splits; validation images that are the training images are none."""
        found = _data_files(folder)
        if len(found) != 1:
            names = ", ".join(map(str, found)) or "none"
            what = f"{len(found)} YAML files with `train` and `names` in {folder} ({names})"
            raise UserError(f"init: {what}; give the folder of one of them")
        data = describe(found[0])
        made: dict[str, Any] = {
            "folder": str(folder),
            "data": data.file.relative_to(folder).as_posix(),
            "train": "train",
        }
        for key in ("val", "valid", "test"):
            if data.content.get(key) and images_of(data, key) != images_of(data, "train"):
                return {**made, "val": key}
        return made

    def write(self, directory: Path) -> RawDataset:
        """Two COCO JSONs; file names start from `folder`, and classes keep their order, category ids beginning at 1."""
        root = self.config.folder.path
        data = describe(root / self.config.data)
        train, findings = self._document("train", self.config.train, data)
        val = None
        if self.config.val is not None:
            val, more = self._document("val", self.config.val, data)
            findings += more
        return written(directory, root, train, val, self.config, findings)

    def _document(self, split: str, key: str, data: Description) -> tuple[CocoDocument, tuple[str, ...]]:
        """One split, and what was met in it. Raises UserError with all that cannot be used."""
        root = self.config.folder.path
        files = images_of(data, key)
        check_inside(split, files, root)
        met = Met()
        images: list[CocoImage] = []
        annotations: list[CocoAnnotation] = []
        with ThreadPoolExecutor() as pool:
            sizes = list(pool.map(upright_size, files))
        for number, (file, size) in enumerate(zip(files, sizes, strict=True), 1):
            if size is None:
                met.unread.append(file.name)
                continue
            height, width = size
            name = file.relative_to(root).as_posix()
            images.append({"id": number, "file_name": name, "height": height, "width": width})
            for label, (x, y, w, h) in _lines(label_file(file, root), root, data, met):
                annotation: CocoAnnotation = {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": label + 1,
                    "bbox": (x * width, y * height, w * width, h * height),
                    "area": w * width * h * height,
                    "iscrowd": 0,
                }
                annotations.append(annotation)
        met.raise_wrong(split)
        categories: list[CocoCategory] = [{"id": label + 1, "name": name} for label, name in sorted(data.names.items())]
        return {"images": images, "annotations": annotations, "categories": categories}, met.findings(split)


@dataclass
class Met:
    """What is out of the ordinary in a split."""

    unread: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    bare: list[str] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)

    def raise_wrong(self, split: str) -> None:
        """Raise UserError where images or lines cannot be used."""
        problems = [sentence(split, "images cannot be read", self.unread, "replace or remove the files")] * any(
            self.unread
        )
        problems += [sentence(split, "lines cannot be used", self.wrong, "correct or remove them")] * any(self.wrong)
        if problems:
            raise UserError("\n".join(problems))

    def findings(self, split: str) -> tuple[str, ...]:
        """How the rest is handled."""
        nothing = "taken as images where nothing is to be found"
        found = [sentence(split, "images have no label file", self.bare, nothing)] * any(self.bare)
        found += [sentence(split, "lines stand there twice", self.twice, "each is one object")] * any(self.twice)
        return tuple(found)


def describe(file: Path) -> Description:
    """Read a data.yaml. Raises UserError where it is none."""
    content = _content(file)
    names = content.get("names") if isinstance(content, dict) else None
    listed = dict(enumerate(names)) if isinstance(names, list) else names
    if not isinstance(listed, dict) or not listed or not all(map(_is_number, listed)):
        raise UserError(f"{file}: names are {names!r}; write a list of the class names, or their numbers and names")
    odd = [name for name in listed.values() if isinstance(name, bool) or not isinstance(name, str | int)]
    if odd:
        quote = "put them in quotes: off, on, yes and no are truth values to YAML"
        raise UserError(sentence(str(file), "names are no text", odd, quote))
    if content.get("nc", len(listed)) != len(listed):
        raise UserError(f"{file}: nc is {content['nc']}, and there are {len(listed)} names; correct one of them")
    return Description(file, content, {int(number): str(name) for number, name in listed.items()})


def _content(file: Path) -> Any:
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{file}: cannot be read ({reason}); give the YAML file with train, val and names") from error


def _is_number(key: object) -> bool:
    """Whether a key of `names` is the number of a class, which some tools put in quotes."""
    return type(key) is int or (isinstance(key, str) and key.isdecimal())


def _data_files(folder: Path) -> list[Path]:
    """The YAML files of a folder and of those in it that have `train` and `names`; what is wrong in them is said later."""
    files = sorted(file for pattern in ("*.yaml", "*.yml", "*/*.yaml", "*/*.yml") for file in folder.glob(pattern))
    found = []
    for file in files:
        with suppress(UserError):  # a YAML file of another kind
            content = _content(file)
            found += [file] if isinstance(content, dict) and content.get("train") and "names" in content else []
    return found


def images_of(data: Description, key: str) -> list[Path]:
    """The images of a split, sorted. Raises UserError where the YAML file does not lead to any."""
    given = data.content.get(key)
    if not given:
        keys = [name for name in data.content if name not in ("names", "nc", "path")]
        raise UserError(f"{data.file}: has no {key!r}{did_you_mean(key, keys)}")
    files: set[Path] = set()
    for entry in given if isinstance(given, list) else [given]:
        places = _places(data, str(entry))
        place = next((place for place in places if place.exists()), None)
        if place is None:
            tried = " nor ".join(map(str, places))
            raise UserError(f"{data.file}: {key}: {entry!r} is neither {tried}; correct `path` or {key!r}")
        logger.info("%s: %s", key, place)
        found = _listed(place) if place.is_file() else image_files(place)
        files.update(Path(os.path.abspath(file)) for file in found)
    if not files:
        raise UserError(f"{data.file}: {key}: {given!r} holds no images; give a folder or a list file that does")
    return sorted(files)


def _places(data: Description, entry: str) -> list[Path]:
    """Where an entry may lie: below `path`, which is seen from the YAML file; and as tools that export whole folders mean
    it, below the YAML file, where they write `../train/images` of what lies beside it."""
    beside = data.file.parent
    named = [beside / str(data.content["path"])] if data.content.get("path") else []
    places = [root / entry for root in [*named, beside]]
    return places + ([beside / entry[3:]] if entry.startswith("../") else [])


def _listed(file: Path) -> Iterator[Path]:
    """The images in a list file, a line each; relative ones start from the file's folder. What is missing is found later."""
    # Names may be of any bytes, as on disk.
    for line in file.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines():
        if line.strip():
            yield file.parent / line.strip()


def label_file(image: Path, root: Path) -> Path:
    """The text file of an image: in `labels` for the last `images` of its path below `root`, or else beside it.

    Where there is none, the path at which it was expected.
    """
    beside = image.with_suffix(".txt")
    for place in image.relative_to(root).parents:
        if place.name == "images":
            apart = root / place.parent / "labels" / beside.relative_to(root / place)
            return beside if beside.is_file() and not apart.is_file() else apart
    return beside


def upright_size(file: Path) -> tuple[int, int] | None:
    """(height, width) as the image is looked at, from the head of the file; None where there is none to read."""
    try:
        with Image.open(file) as image:
            exif = image.getexif()
            if exif.get(0x0112) not in TURNED:
                return image.height, image.width
            if image.format == "TIFF":  # some versions of Pillow open it turned, so what is stored counts
                return exif[0x0100], exif[0x0101]
            return image.width, image.height
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError, LookupError):
        return None


def _lines(file: Path, root: Path, data: Description, met: Met) -> Iterator[Line]:
    """The objects of a label file, none where there is no file. What is wrong is noted by file and line."""
    if not file.is_file():
        met.bare.append(file.relative_to(root).as_posix())
        return
    seen = set()
    for number, text in enumerate(file.read_text(encoding="utf-8-sig", errors="replace").splitlines(), 1):
        words = tuple(text.split())
        if not words:
            continue
        if words in seen:
            met.twice.append(f"{file.name}:{number}")
            continue
        seen.add(words)
        try:
            yield read_line(text, data)
        except ValueError as error:
            met.wrong.append(f"{file.name}:{number}: {error}")


def read_line(text: str, data: Description) -> Line:
    """One line. Raises ValueError saying why it is none."""
    words = text.split()
    try:
        values = [float(word) for word in words]
    except ValueError:
        raise ValueError(f"{text.strip()!r} holds what is no number") from None
    if not all(math.isfinite(value) for value in values):
        raise ValueError(f"{text.strip()!r} holds a number that is not finite")
    label, places = values[0], values[1:]
    if label not in data.names:
        raise ValueError(f"class {words[0]} is not among the {len(data.names)} names")
    if data.boxes_first():
        places = places[:4]
    if len(places) != 4 and (len(places) < 6 or len(places) % 2):
        raise ValueError(f"{len(words)} numbers; a box has 5, a polygon 7 or more, an odd number")
    if outside := [value for value in places if not -TOLERANCE <= value <= 1 + TOLERANCE]:
        raise ValueError(f"{outside[0]:g} is not a fraction of the image, from 0 to 1")
    if len(places) == 4:
        x, y, width, height = places
        if width < 0 or height < 0:
            raise ValueError(f"a box of {width:g} x {height:g}")
        return Line(int(label), (x - width / 2, y - height / 2, width, height))
    xs, ys = places[0::2], places[1::2]
    return Line(int(label), (min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)))
