"""A COCO instances file: what detection needs of it, read and typed."""

from __future__ import annotations

import codecs
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import FiniteFloat, TypeAdapter, ValidationError
from typing_extensions import NotRequired, TypedDict  # pydantic takes its own from here before Python 3.12

from pipeline.errors import UserError
from pipeline.log import logger

EXAMPLES = 3


class CocoImage(TypedDict):
    """One entry of `images`."""

    id: int
    file_name: str
    width: NotRequired[int]
    height: NotRequired[int]


class CocoAnnotation(TypedDict):
    """One entry of `annotations`; `bbox` is (x, y, width, height) in pixels."""

    id: int
    image_id: int
    category_id: int
    bbox: tuple[FiniteFloat, FiniteFloat, FiniteFloat, FiniteFloat]
    area: NotRequired[FiniteFloat]
    iscrowd: NotRequired[int]


class CocoCategory(TypedDict):
    """One entry of `categories`."""

    id: int
    name: str


class CocoDocument(TypedDict):
    """The parts of a COCO instances file that detection needs; whatever else is in it is left out."""

    info: NotRequired[Any]
    images: list[CocoImage]
    annotations: list[CocoAnnotation]
    categories: list[CocoCategory]


def sentence(where: str, what: str, items: Sequence[object], rest: str) -> str:
    """`where: 5 what (a, b, c, ...); rest`, with the first few of the items."""
    shown = ", ".join(str(item) for item in items[:EXAMPLES])
    more = ", ..." if len(items) > EXAMPLES else ""
    return f"{where}: {len(items)} {what} ({shown}{more}); {rest}"


def parse(file: Path) -> CocoDocument:
    """Read a COCO instances file. What is null counts as missing; an annotation that has a mask and no box gets its box.

    Raises UserError naming every entry that is not what COCO says, the first few of each sort with their place.
    """
    try:
        content = file.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); give the path of a COCO JSON") from error
    try:
        return _DOCUMENT.validate_json(content)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False)
    if found[0]["type"] != "json_invalid":
        # Masks are left out above, for they are most of a large file; here they may be needed.
        document = json.loads(content)
        _leave_out_empty(document)
        _boxes_from_masks(document, file)
        try:
            return _DOCUMENT.validate_python(document)
        except ValidationError as error:
            found = error.errors(include_url=False, include_context=False)
    wrong: dict[str, list[str]] = defaultdict(list)
    for item in found:
        first, *rest = item["loc"] or ("the file",)
        place = str(first) + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in rest)
        wrong[item["msg"]].append(place)
    lines = [
        sentence(str(file), f"x '{message}'", places, "write it as COCO instances have it")
        for message, places in wrong.items()
    ]
    raise UserError("\n".join(lines))


_DOCUMENT = TypeAdapter(CocoDocument)


def _leave_out_empty(document: Any) -> None:
    """Remove what is null from the entries, and boxes without numbers: some tools write them for what they do not know."""
    for key in ("images", "annotations"):
        entries = document.get(key) if isinstance(document, dict) else None
        for entry in entries if isinstance(entries, list) else ():
            if isinstance(entry, dict):
                for name in [name for name, value in entry.items() if value is None or (name, value) == ("bbox", [])]:
                    del entry[name]


def _boxes_from_masks(document: Any, file: Path) -> None:
    """Give each annotation that has a segmentation and no `bbox` the box, and where it lacks, the area, of its mask."""
    annotations = document.get("annotations") if isinstance(document, dict) else None
    made = []
    for annotation in annotations if isinstance(annotations, list) else ():
        if not isinstance(annotation, dict) or "bbox" in annotation or not annotation.get("segmentation"):
            continue
        try:
            box, area = mask_box(annotation["segmentation"])
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):  # no mask: `bbox` stays missing
            continue
        annotation["bbox"] = box
        annotation.setdefault("area", area)
        made.append(f"annotation {annotation.get('id')}")
    if made:
        logger.warning("%s", sentence(str(file), "annotations have a mask and no box", made, "the mask's box is taken"))


def mask_box(segmentation: Sequence[Sequence[float]] | Mapping[str, Any]) -> tuple[list[float], float]:
    """The box (x, y, width, height) of a COCO segmentation and its area, in pixels.

    Run lengths, compressed or not, cover whole pixels; polygons reach from their least to their largest coordinates, as
    in COCO's own files, and their area is that of the shoelace formula. Raises ValueError and the like where it is none.
    """
    if isinstance(segmentation, Mapping):
        from pycocotools import mask

        height, width = segmentation["size"]
        rle = dict(segmentation)
        if isinstance(rle["counts"], list):
            rle = mask.frPyObjects(rle, height, width)
        area = float(mask.area(rle))
        if not area:
            raise ValueError("an empty mask")
        return [float(side) for side in mask.toBbox(rle)], area
    xs = [float(x) for polygon in segmentation for x in polygon[0::2]]
    ys = [float(y) for polygon in segmentation for y in polygon[1::2]]
    return [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)], sum(_shoelace(polygon) for polygon in segmentation)


def _shoelace(polygon: Sequence[float]) -> float:
    points = list(zip(polygon[0::2], polygon[1::2], strict=True))
    turned = [*points[1:], *points[:1]]
    return abs(sum(x1 * y2 - x2 * y1 for (x1, y1), (x2, y2) in zip(points, turned, strict=True))) / 2
