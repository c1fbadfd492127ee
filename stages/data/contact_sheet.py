"""A contact sheet: training images with their boxes as detectors get them, and how often each class is there.

    source --parse, classes--> documents --a few images--> CocoSplit --place--> canvases with boxes --> one PNG

The images go through the code of the training: decoded, upright, resized and padded to the canvas, without crowds and
empty boxes. Augmentation is a setting of each training, and left out here.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageStat

from deploy.drawing import colour
from deploy.errors import DeployError
from deploy.image import ImageSpec, decode
from pipeline.errors import UserError
from stages.artifacts.dataset import SplitName
from stages.data.augment import AugmentConfig, place
from stages.data.classes import Classes, keep, selected
from stages.data.coco import CocoSplit
from stages.data.coco_check import check_documents
from stages.data.coco_document import CocoDocument, parse
from stages.data.sheet import drawn
from stages.data.source import RawDataset

IMAGES = 24
COLUMNS = 6
CELL_PX = 320  # longer side of a canvas on the sheet
MARGIN_PX = 8
LINE_PX = 18


def contact_sheet(raw: RawDataset, size: tuple[int, int], classes: Classes | None, out: Path) -> list[str]:
    """Draw some training images, spread evenly over those that have boxes, to the PNG `out`; `size` is the (height, width)
    of the canvas. Returns lines that say what is there. Raises UserError where the data cannot be read, or refers to what
    it does not list."""
    documents: dict[SplitName, CocoDocument] = {
        "train": parse(raw.train.annotations),
        "val": parse(raw.val.annotations),
    }
    check_documents(documents)
    if classes:
        categories, ids = selected(documents["train"]["categories"], classes)
        for document in documents.values():
            keep(document, ids)
            document["categories"] = categories
    categories = sorted(documents["train"]["categories"], key=lambda category: category["id"])
    counts = {split: _counts(document) for split, document in documents.items()}
    names = [category["name"] for category in categories]
    legend = [
        f"{category['name']} {counts['train'][category['id']]:,} + {counts['val'][category['id']]:,}"
        for category in categories
    ]
    cells = _cells(documents["train"], raw.train.images, size, names)
    out.parent.mkdir(parents=True, exist_ok=True)
    _sheet(cells, legend).save(out)
    images = " + ".join(f"{len(document['images']):,}" for document in documents.values())
    return [
        f"{images} images, boxes of training + validation: {', '.join(legend)}",
        f"contact sheet of {len(cells)} training images: {out}",
    ]


def _counts(document: CocoDocument) -> Counter[int]:
    """Boxes of each category, crowds not counted."""
    return Counter(a["category_id"] for a in document["annotations"] if not a.get("iscrowd"))


def _cells(
    document: CocoDocument, folder: Path, size: tuple[int, int], names: Sequence[str]
) -> list[tuple[Image.Image, str]]:
    """Canvases with boxes, and what to say below each."""
    filled = {a["image_id"] for a in document["annotations"] if not a.get("iscrowd")}
    listed = [image for image in document["images"] if image["id"] in filled]
    if not listed:
        raise UserError("train: no image has a box; give annotations that have some")
    places = np.unique(np.linspace(0, len(listed) - 1, min(IMAGES, len(listed))).round().astype(int))
    chosen = [listed[place] for place in places]
    means = []
    for image in chosen:
        try:
            picture = decode(folder / image["file_name"])
        except DeployError as error:
            raise UserError(str(error)) from error
        image["height"], image["width"] = picture.height, picture.width
        means.append(ImageStat.Stat(picture).mean)
    red, green, blue = (round(level) for level in np.mean(means, axis=0))
    wanted = {image["id"] for image in chosen}
    annotations = [{"iscrowd": 0, **a} for a in document["annotations"] if a["image_id"] in wanted]
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "chosen.json"
        file.write_text(json.dumps({**document, "images": chosen, "annotations": annotations}), encoding="utf-8")
        split = CocoSplit(folder, file)
    spec, plain = ImageSpec(*size, (red, green, blue)), AugmentConfig()
    cells = []
    for index, image in enumerate(chosen):
        placed = place(split.sample(index), spec, plain, np.random.default_rng(0))
        boxes, labels = (values.tolist() for values in placed.targets())
        cells.append((drawn(placed.canvas_HWC, boxes, labels, names, CELL_PX), Path(image["file_name"]).name))
    return cells


def _sheet(cells: Sequence[tuple[Image.Image, str]], legend: Sequence[str]) -> Image.Image:
    """The legend, and below it the cells in rows."""
    font = ImageFont.load_default(13)
    wide, high = cells[0][0].size
    columns = min(COLUMNS, len(cells))
    width = max(columns * (wide + MARGIN_PX) + MARGIN_PX, 2 * CELL_PX)
    lines: list[list[tuple[int, int, str]]] = [[]]  # (x, label, text)
    x = MARGIN_PX
    for label, text in enumerate(legend):
        needed = round(font.getlength(text)) + LINE_PX + 2 * MARGIN_PX
        if x + needed > width and lines[-1]:
            lines.append([])
            x = MARGIN_PX
        lines[-1].append((x, label, text))
        x += needed
    head = len(lines) * LINE_PX + 2 * MARGIN_PX
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (width, head + rows * (high + LINE_PX + MARGIN_PX)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, line in enumerate(lines):
        for left, label, text in line:
            y = MARGIN_PX + row * LINE_PX
            pen.rectangle((left, y + 2, left + 12, y + 14), fill=colour(label))
            pen.text((left + LINE_PX, y), text, fill="black", font=font)
    for number, (cell, caption) in enumerate(cells):
        left = MARGIN_PX + number % columns * (wide + MARGIN_PX)
        top = head + number // columns * (high + LINE_PX + MARGIN_PX)
        sheet.paste(cell, (left, top))
        pen.text((left, top + high + 1), caption[-wide // 8 :], fill="black", font=font)
    return sheet
