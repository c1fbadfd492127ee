"""A sheet of training images as they are learnt from: augmented, with their boxes, for people to look at."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from deploy.drawing import colour
from deploy.image import ImageSpec
from stages.data.augment import AugmentConfig
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
        scale = PANEL_PX / max(pixels_HWC.shape)
        size = [max(1, round(side * scale)) for side in (pixels_HWC.shape[1], pixels_HWC.shape[0])]
        panel = Image.fromarray(pixels_HWC).resize((size[0], size[1]), Image.Resampling.BICUBIC)
        pen, font = ImageDraw.Draw(panel), ImageFont.load_default(10)
        for box, label in zip((boxes_N4 * scale).tolist(), labels_N.tolist(), strict=True):
            pen.rectangle(box, outline=colour(label), width=2)
            place = pen.textbbox((box[0] + 2, max(0.0, box[1])), classes[label], font=font)
            pen.rectangle(place, fill=colour(label))
            pen.text((box[0] + 2, max(0.0, box[1])), classes[label], fill="black", font=font)
        yield panel


def _tiled(panels: Sequence[Image.Image]) -> Image.Image:
    width, height = (side + _GAP_PX for side in panels[0].size)
    sheet = Image.new("RGB", (ACROSS * width - _GAP_PX, -(-len(panels) // ACROSS) * height - _GAP_PX), "white")
    for number, panel in enumerate(panels):
        sheet.paste(panel, (number % ACROSS * width, number // ACROSS * height))
    return sheet
