"""Validation images with boxes: what is there, and what each model says is there.

Blue is right (class, and IoU of at least 0.5 with an object that no surer box has), orange is wrong, dashed white was
missed. Colours that people who see no red and green can tell apart.
"""

from __future__ import annotations

import base64
import io
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from deploy.image import decode
from stages.artifacts.dataset import Dataset

SCORE = 0.3  # least score of a box that is drawn
_IOU = 0.5
_PANEL_PX = 440  # longer side: small images grow until their boxes can be read
_QUALITY = 80
_RIGHT, _WRONG, _TRUTH = "#3b9dff", "#ff8a1f", "#ffffff"

_Line = Literal["plain", "thin", "dashed"]
_Area = tuple[float, float, float, float]  # x1, y1, x2, y2
Result = Mapping[str, Any]  # as COCO writes it


@dataclass(frozen=True)
class Panel:
    """One image with boxes, as a data URI, and what to say below it."""

    uri: str
    caption: str


@dataclass(frozen=True)
class Strip:
    """One validation image: ground truth, then one panel a model."""

    file_name: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class _Box:
    xyxy: tuple[float, float, float, float]
    text: str
    category_id: int


def strips(data: Dataset, models: Mapping[str, Sequence[Result]], count: int) -> list[Strip]:
    """Images spread evenly over those of the validation split that have objects: nobody chose them.

    `models` holds COCO results by the name to print. Raises DeployError when an image can no longer be read.
    """
    document = json.loads(data.annotations("val").read_bytes())
    names = {category["id"]: category["name"] for category in document["categories"]}
    truth: dict[int, list[_Box]] = defaultdict(list)
    for annotation in document["annotations"]:
        if not annotation.get("iscrowd"):
            truth[annotation["image_id"]].append(_box(annotation, names))
    shown = [image for image in document["images"] if truth[image["id"]]]
    places = np.linspace(0, len(shown) - 1, min(count, len(shown))).round().astype(int)
    chosen = [shown[place] for place in places]
    found = {model: _by_image(results, {image["id"] for image in chosen}) for model, results in models.items()}
    made = []
    for image in chosen:
        picture = decode(data.folder("val") / image["file_name"])
        objects = truth[image["id"]]
        panels = [Panel(_uri(picture, [(box, _TRUTH, "plain") for box in objects]), f"ground truth: {len(objects)}")]
        panels += [_panel(picture, objects, found[model][image["id"]], names, model) for model in models]
        made.append(Strip(image["file_name"], tuple(panels)))
    return made


def _by_image(results: Sequence[Result], wanted: set[int]) -> dict[int, list[Result]]:
    """Results worth drawing, the surest first."""
    found: dict[int, list[Result]] = defaultdict(list)
    for result in sorted(results, key=lambda one: -one["score"]):
        if result["score"] >= SCORE and result["image_id"] in wanted:
            found[result["image_id"]].append(result)
    return found


def _panel(
    picture: Image.Image, objects: list[_Box], results: list[Result], names: Mapping[int, str], model: str
) -> Panel:
    boxes = [_box(result, names) for result in results]
    right, missed = matched(
        np.array([box.xyxy for box in boxes]).reshape(-1, 4),
        [box.category_id for box in boxes],
        np.array([box.xyxy for box in objects]).reshape(-1, 4),
        [box.category_id for box in objects],
    )
    drawn: list[tuple[_Box, str, _Line]] = [(objects[index], _TRUTH, "dashed") for index in missed]
    for index, box in reversed(list(enumerate(boxes))):  # the surest on top
        again = index not in right and any(_overlap(box, surer) >= _IOU for surer in boxes[:index])
        drawn.append((box, _RIGHT if index in right else _WRONG, "thin" if again else "plain"))
    caption = f"{model}: {len(right)} of {len(objects)} found"
    wrong = len(boxes) - len(right)
    return Panel(_uri(picture, drawn), caption + (f", {wrong} wrong" if wrong else ""))


def matched(
    found_xyxy: NDArray[np.float64], found: Sequence[int], true_xyxy: NDArray[np.float64], true: Sequence[int]
) -> tuple[set[int], list[int]]:
    """Indices of the boxes that are right and of the objects that were missed; boxes come from sure to unsure.

    Each box takes the free object of its class that it overlaps most.
    """
    free = set(range(len(true)))
    right = set()
    for index, (box, category_id) in enumerate(zip(found_xyxy, found, strict=True)):
        rivals = [other for other in free if true[other] == category_id]
        overlaps = [_iou(box, true_xyxy[other]) for other in rivals]
        if overlaps and max(overlaps) >= _IOU:
            free.remove(rivals[int(np.argmax(overlaps))])
            right.add(index)
    return right, sorted(free)


def _overlap(a: _Box, b: _Box) -> float:
    return _iou(np.array(a.xyxy), np.array(b.xyxy))


def _iou(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    sides = np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None)
    inter = float(sides.prod())
    union = float((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod()) - inter
    return inter / union if union > 0 else 0.0


def _box(one: Mapping[str, Any], names: Mapping[int, str]) -> _Box:
    x, y, width, height = one["bbox"]
    score = f" {one['score']:.2f}" if "score" in one else ""
    return _Box((x, y, x + width, y + height), names[one["category_id"]] + score, one["category_id"])


def _uri(picture: Image.Image, boxes: Sequence[tuple[_Box, str, _Line]]) -> str:
    """A JPEG with boxes of a colour, the last on top; coordinates are those of the picture before it is scaled."""
    scale = _PANEL_PX / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    drawn = picture.resize((width, height), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(drawn)
    for box, colour, line in boxes:
        x1, y1, x2, y2 = (scale * value for value in box.xyxy)
        if line == "dashed":
            _dashed(pen, (x1, y1, x2, y2), colour)
        elif line == "thin":
            pen.rectangle((x1, y1, x2, y2), outline=colour, width=1)
        else:
            pen.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline="black", width=5)  # a rim, for any background
            pen.rectangle((x1, y1, x2, y2), outline=colour, width=3)
    font = ImageFont.load_default(18)
    taken: list[_Area] = []
    for box, colour, line in reversed(boxes):  # no outline runs through a label, and the surest choose their place
        if line == "plain":
            left, _, right, bottom = pen.textbbox((0, 0), box.text, font=font)
            x1, y1, x2, y2 = (scale * value for value in box.xyxy)
            place = label_place((x1, y1, x2, y2), right - left + 5, bottom + 3, (width, height), taken)
            pen.rectangle(place, fill=colour)
            pen.text((place[0] + 2, place[1]), box.text, fill="black", font=font)
            taken.append(place)
    file = io.BytesIO()
    drawn.save(file, "JPEG", quality=_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def label_place(box: _Area, wide: float, high: float, size: tuple[int, int], taken: Sequence[_Area]) -> _Area:
    """Where a label covers no other: above its box, below it, inside it at the top or bottom; else above or inside."""
    x = max(0.0, min(box[0] - 1, size[0] - wide))
    places = [(x, y, x + wide, y + high) for y in (box[1] - high, box[3], box[1] + 2, box[3] - high - 2)]
    inside = [place for place in places if place[1] >= 0 and place[3] <= size[1]] or places[2:3]
    return next((place for place in inside if not any(_touch(place, other) for other in taken)), inside[0])


def _touch(a: _Area, b: _Area) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _dashed(pen: ImageDraw.ImageDraw, xyxy: tuple[float, float, float, float], colour: str, dash: float = 7) -> None:
    x1, y1, x2, y2 = xyxy
    for (ax, ay), (bx, by) in (((x1, y1), (x2, y1)), ((x2, y1), (x2, y2)), ((x2, y2), (x1, y2)), ((x1, y2), (x1, y1))):
        length = max(abs(bx - ax), abs(by - ay), 1e-6)
        for start in np.arange(0, length, 2 * dash):
            a, b = start / length, min(start + dash, length) / length
            line = (ax + a * (bx - ax), ay + a * (by - ay), ax + b * (bx - ax), ay + b * (by - ay))
            pen.line(line, fill="black", width=5)
            pen.line(line, fill=colour, width=3)
