"""Pascal VOC: one XML file an image, with the first and the last pixel of every object.

    VOC2012/ImageSets/Main/train.txt + VOC2012/Annotations/*.xml + VOC2012/JPEGImages/*.jpg    train: train
    VOCdevkit/VOC2007/... and VOCdevkit/VOC2012/...          train: [VOC2007/trainval, VOC2012/trainval]
    train/a.jpg + train/a.xml (an export without image sets)                                   train: train
    Annotations/*.xml + JPEGImages/*.jpg, and no image sets                                    train: "*"

The conventions are those of the VOC2012 development kit (http://host.robots.ox.ac.uk/pascal/VOC/): coordinates count
pixels from 1, and the last pixel belongs to the box, so (xmin, xmax) = (1, 10) is x = 0 and width = 10.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pipeline.config import ExternalFolder
from pipeline.errors import UserError
from stages.data.coco_document import CocoAnnotation, CocoDocument, CocoImage, sentence
from stages.data.coco_layout import folders, split_word
from stages.data.division import DivisionConfig, check_inside, written
from stages.data.image_files import SUFFIXES
from stages.data.source import RawDataset, Source

IMAGE_FOLDERS = ("JPEGImages", "images")


class Object(NamedTuple):
    """One object of an XML file."""

    name: str
    box_xywh: tuple[float, float, float, float]
    difficult: bool


@dataclass
class Labels:
    """What one XML file says."""

    file: Path
    image: Path
    size: tuple[int, int] | None
    """(height, width), where they are given."""
    objects: list[Object] = field(default_factory=list)


class Voc(Source):
    """Folders as Pascal VOC has them."""

    class Config(DivisionConfig):
        """Where the files are, and how they are meant."""

        folder: ExternalFolder
        """Folder that holds everything: `VOC2012`, or `VOCdevkit` with image sets named `VOC2012/train`."""
        train: str | tuple[str, ...]
        """Image set to train on (a file of ImageSets/Main without `.txt`), or several; or a folder of XML files; or `*`, which
        is all of `Annotations`."""
        val: str | tuple[str, ...] | None = None
        """The same to validate on; give this or `val_fraction`."""
        difficult: Literal["ignore", "object", "drop"] = "ignore"
        """Objects marked difficult: `ignore` them as VOC's evaluation does (crowds: not trained on, found or not they do not
        count), take them as any `object`, or `drop` them (then finding one is a mistake)."""
        corners: Literal["pixels", "edges"] = "pixels"
        """Coordinates name the first and last `pixels`, counted from 1, as in VOC; or the `edges`, counted from 0, as many tools
        write them: (xmin, xmax) = (0, 10) is then x = 0 and width = 10."""

    config: Config

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        return any(_is_voc(next(place.glob("*.xml"), None)) for place in folders(folder))

    @classmethod
    def settings(cls, folder: Path, given: Mapping[str, Path | None]) -> dict[str, Any]:
        """The image sets of every year, or folders of XML files, by their names."""
        train, val = [], []
        for place in folders(folder):
            mine = {} if place.parent.name == "ImageSets" else _sets(place, folder)
            train += mine.get("train", [])
            val += mine.get("val", [])
        if not train:
            raise UserError(
                f"init: no VOC annotations to train on below {folder}; name a folder or an image set `train`"
            )
        # The folder's own set by its name alone; a single one is no list.
        made: dict[str, Any] = {"folder": str(folder), "train": train[0] if len(train) == 1 else train}
        if val:
            made["val"] = val[0] if len(val) == 1 else val
        length = {} if val else {"val_fraction": 0.5}
        found = cls(cls.Config.model_validate({**made, **length}))
        if found._findings("train", [found._read(file, []) for file in found._files("train", found.config.train)]):
            made["corners"] = "edges"
        return made

    def write(self, directory: Path) -> RawDataset:
        """Two COCO JSONs; file names start from `folder`. Classes are in the order of the alphabet, for VOC lists none."""
        root, wrong = self.config.folder.path, list[str]()
        train = [self._read(file, wrong) for file in self._files("train", self.config.train)]
        val = None if self.config.val is None else [self._read(f, wrong) for f in self._files("val", self.config.val)]
        if wrong:
            raise UserError(sentence("voc", "annotations cannot be used", wrong, "correct or remove them"))
        for split, part in (("train", train), ("val", val or [])):
            check_inside(split, [labels.image for labels in part], root)
        names = sorted({one.name for labels in [*train, *(val or [])] for one in labels.objects})
        findings = self._findings("train", train) + self._findings("val", val or [])
        documents = [None if part is None else self._document(part, names, root) for part in (train, val)]
        assert documents[0] is not None
        return written(directory, root, documents[0], documents[1], self.config, findings)

    def _files(self, split: str, sets: str | Sequence[str]) -> list[Path]:
        """The XML files of a split. Raises UserError where a set is not there, or lists what has no XML file."""
        return [file for one in ([sets] if isinstance(sets, str) else sets) for file in self._set(split, one)]

    def _set(self, split: str, name: str) -> list[Path]:
        path = self.config.folder.path / name
        listing = path.parent / "ImageSets" / "Main" / f"{path.name}.txt"
        if path.name == "*" or (path.is_dir() and not listing.is_file()):
            folder = path.parent / "Annotations" if path.name == "*" else path
            files = sorted(folder.glob("*.xml"))
            if not files:
                raise UserError(f"{split}: no XML files in {folder}; name a folder or an image set that has some")
            return files
        if not listing.is_file():
            raise UserError(
                f"{split}: no image set {listing}, no folder {path}; name a file of ImageSets/Main without .txt, or `*`"
            )
        ids = [line.strip() for line in listing.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        files = [path.parent / "Annotations" / f"{one}.xml" for one in ids]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            what = f"of {listing} have no file in {path.parent / 'Annotations'}"
            raise UserError(sentence(split, what, missing, "put them there, or take them from the image set"))
        return files

    def _read(self, file: Path, wrong: list[str]) -> Labels:
        """What an XML file says; what is wrong in it is added to `wrong`, with the file's name."""
        labels = Labels(file, file, None)
        try:
            root = _root(file)
            labels.image = _image_of(file, (root.findtext("filename") or "").strip())
            width, height = (int(float(root.findtext(f"size/{side}") or 0)) for side in ("width", "height"))
            labels.size = (height, width) if width > 0 and height > 0 else None
            labels.objects = list(self._objects(root))
        except ValueError as error:
            wrong.append(f"{file.name}: {error}")
        return labels

    def _objects(self, root: ElementTree.Element) -> Iterator[Object]:
        """The objects themselves: parts of persons have boxes of their own, further down. Raises ValueError."""
        for number, element in enumerate(root.findall("object"), 1):
            name = (element.findtext("name") or "").strip()
            given = [element.findtext(f"bndbox/{corner}") for corner in ("xmin", "ymin", "xmax", "ymax")]
            try:
                left, top, right, bottom = (float(value or "") for value in given)
            except ValueError:
                raise ValueError(f"object {number} ({name or 'no name'}) has the corners {given}") from None
            if not name:
                raise ValueError(f"object {number} has no name")
            first = 1 if self.config.corners == "pixels" else 0
            box = (left - first, top - first, right - left + first, bottom - top + first)
            difficult = (element.findtext("difficult") or "0").strip() not in ("0", "false", "False")
            if not (difficult and self.config.difficult == "drop"):
                yield Object(name, box, difficult and self.config.difficult == "ignore")

    def _findings(self, split: str, read: list[Labels]) -> tuple[str, ...]:
        zero = [
            f"{labels.file.name}: {one.name}"
            for labels in read
            for one in labels.objects
            if min(one.box_xywh[:2]) < 0 and self.config.corners == "pixels"
        ]
        how = "pixels are counted from 1, as in VOC; if 0 is the edge of the image, set corners: edges"
        return (sentence(split, "boxes begin at pixel 0 or before", zero, how),) if zero else ()

    def _document(self, read: list[Labels], names: list[str], root: Path) -> CocoDocument:
        images: list[CocoImage] = []
        annotations: list[CocoAnnotation] = []
        for labels in read:
            image: CocoImage = {"id": len(images) + 1, "file_name": labels.image.relative_to(root).as_posix()}
            if labels.size:
                image["height"], image["width"] = labels.size
            images.append(image)
            for one in labels.objects:
                annotation: CocoAnnotation = {
                    "id": len(annotations) + 1,
                    "image_id": image["id"],
                    "category_id": names.index(one.name) + 1,
                    "bbox": one.box_xywh,
                    "area": max(0.0, one.box_xywh[2]) * max(0.0, one.box_xywh[3]),
                    "iscrowd": int(one.difficult),
                }
                annotations.append(annotation)
        categories = [{"id": number, "name": name} for number, name in enumerate(names, 1)]
        return {"images": images, "annotations": annotations, "categories": categories}  # type: ignore[typeddict-item]


def _root(file: Path) -> ElementTree.Element:
    """The outermost element of an XML file. Raises ValueError saying why there is none."""
    try:
        return ElementTree.parse(file).getroot()
    except (ElementTree.ParseError, OSError) as error:
        raise ValueError(str(error)) from error
    except (ValueError, LookupError) as error:  # the encoding that it names is none that Python's parser has
        raise ValueError(f"{error}: save it as UTF-8") from error


def _is_voc(file: Path | None) -> bool:
    try:
        return file is not None and _root(file).tag == "annotation"
    except ValueError:
        return False


def _sets(place: Path, folder: Path) -> dict[str, list[str]]:
    """What of a folder is to be trained and validated on, as the settings name it."""
    within = place.relative_to(folder)
    sets = {file.stem for file in (place / "ImageSets" / "Main").glob("*.txt")}
    for train, val in (("train", "val"), ("train", "valid"), ("trainval", "test"), ("train", "test")):
        if {train, val} <= sets:
            return {"train": [(within / train).as_posix()], "val": [(within / val).as_posix()]}
    single = next(
        (name for name in ("trainval", "train", "all", "default", "val", "valid", "test") if name in sets), None
    )
    if single or any((place / "Annotations").glob("*.xml")):
        named = within / (single or "*")
    elif place.name != "Annotations" and _is_voc(next(place.glob("*.xml"), None)):
        named = within
    else:
        return {}
    # A set's own name counts before those of its folders; `trainval` is no word of its own.
    split = "train" if single == "trainval" else split_word(named)
    return {split or "train": [named.as_posix()]}


def _image_of(file: Path, named: str) -> Path:
    """The image of an XML file: of the same name, in JPEGImages or images or beside it; or else the one that it names.

    Where there is none, the path at which it was expected: that it is missing is found with all others that are.
    """
    folders = _image_folders(file)
    names = [f"{file.stem}{suffix}" for suffix in (*SUFFIXES, *map(str.upper, SUFFIXES))]
    said = Path(named.replace("\\", "/")).name or names[0]  # of a path on another machine, its last part
    for name in [*names, said]:
        for folder in folders:
            if (folder / name).is_file():
                return folder / name
    return next((folder for folder in folders if folder.is_dir()), file.parent) / said


def _image_folders(file: Path) -> list[Path]:
    """Where the image of an XML file may lie: in a folder of images that stands for `Annotations` in its path, or beside
    it."""
    for place in file.parents:
        if place.name.lower() == "annotations":
            below = file.parent.relative_to(place)
            return [*(place.parent / name / below for name in IMAGE_FOLDERS), file.parent]
    return [file.parent]
