"""A sheet of training images as they are learnt from: augmented, with their boxes, for people to look at."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from deploy.drawing import colour
from deploy.image import ImageSpec
from stages.data.augment import AugmentConfig, Pixels
from stages.data.coco import CocoSplit
from stages.data.loader import Batch, training_batches

ACROSS = 4
PANEL_PX = 240  # longer side
_GAP_PX = 4


def sample_sheet(
    split: CocoSplit, spec: ImageSpec, augment: AugmentConfig, seed: int, classes: Sequence[str]
) -> Image.Image:
    """The first eight images of a training. Where mosaic and mixup are switched off, the first four, and the first four
    after that."""
    first = 1  # a step of four images
    if augment.switch_off is not None:
        first = -(-round(augment.switch_off * len(split)) // ACROSS)
    panels: list[Image.Image] = []
    for step in (0, first):
        (batch,) = islice(training_batches(split, spec, augment, ACROSS, seed, step), 1)
        panels += _panels(batch, classes)
    return _tiled(panels)


def _panels(batch: Batch, classes: Sequence[str]) -> Iterable[Image.Image]:
    for image_CHW, boxes_N4, labels_N in zip(batch.images_BCHW, batch.boxes, batch.labels, strict=True):
        pixels_HWC = np.ascontiguousarray(image_CHW.permute(1, 2, 0).numpy())
        yield drawn(pixels_HWC, boxes_N4.tolist(), labels_N.tolist(), classes, PANEL_PX)


def drawn(
    pixels_HWC: Pixels, boxes: Sequence[Sequence[float]], labels: Sequence[int], classes: Sequence[str], longest_px: int
) -> Image.Image:
    """A canvas, its longer side `longest_px`, with its boxes (xyxy in pixels of the canvas) and their classes; small ones on
    top."""
    scale = longest_px / max(pixels_HWC.shape)
    size = max(1, round(pixels_HWC.shape[1] * scale)), max(1, round(pixels_HWC.shape[0] * scale))
    panel = Image.fromarray(pixels_HWC).resize(size, Image.Resampling.BICUBIC)
    pen, font = ImageDraw.Draw(panel), ImageFont.load_default(max(10, longest_px // 26))
    rows = sorted(zip(boxes, labels, strict=True), key=lambda row: (row[0][0] - row[0][2]) * (row[0][3] - row[0][1]))
    for box, label in rows:
        x1, y1, x2, y2 = (value * scale for value in box)
        pen.rectangle((x1, y1, x2, y2), outline=colour(label), width=2)
        _, _, right, bottom = pen.textbbox((0, 0), classes[label], font=font)
        top = y1 - bottom - 2 if y1 > bottom + 2 else y1 + 2
        left = max(0.0, min(x1, panel.width - right - 3))
        pen.rectangle((left, top, left + right + 3, top + bottom + 2), fill=colour(label))
        pen.text((left + 2, top), classes[label], fill="black", font=font)
    return panel


def _tiled(panels: Sequence[Image.Image]) -> Image.Image:
    width, height = (side + _GAP_PX for side in panels[0].size)
    sheet = Image.new("RGB", (ACROSS * width - _GAP_PX, -(-len(panels) // ACROSS) * height - _GAP_PX), "white")
    for number, panel in enumerate(panels):
        sheet.paste(panel, (number % ACROSS * width, number // ACROSS * height))
    return sheet
