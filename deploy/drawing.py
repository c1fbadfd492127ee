"""Detections drawn on their image, for people to look at."""

from __future__ import annotations

import colorsys
from typing import TYPE_CHECKING

from PIL import ImageDraw, ImageFont

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image

    from deploy.detections import Detections


def draw(image: Image.Image, detections: Detections, classes: Sequence[str]) -> Image.Image:
    """A copy of an RGB image with each detection's box, class and score; a class keeps its colour everywhere."""
    drawn = image.copy()
    pen = ImageDraw.Draw(drawn)
    # Lines and letters grow with the image, so that a large photograph is as readable as a thumbnail.
    line = max(1, round(max(image.size) / 400))
    font = ImageFont.load_default(max(10, max(image.size) // 50))
    rows = zip(detections.boxes_xyxy.tolist(), detections.scores.tolist(), detections.labels.tolist(), strict=True)
    for (x1, y1, x2, y2), score, label in reversed(list(rows)):  # the surest ends on top
        fill = colour(label)
        pen.rectangle((x1, y1, x2, y2), outline=fill, width=line)
        text = f"{classes[label]} {score:.2f}"
        left, _, right, bottom = pen.textbbox((0, 0), text, font=font)
        # Above the box, or inside it where it touches the top of the image.
        x, y = max(0.0, min(x1, image.width - (right - left))), y1 - (bottom + line)
        y = y if y >= 0 else y1 + line
        pen.rectangle((x + left - line, y, x + right + line, y + bottom + line), fill=fill)
        pen.text((x, y), text, fill="black", font=font)
    return drawn


def colour(label: int) -> tuple[int, int, int]:
    """The (red, green, blue) of a class."""
    # Hues a golden section apart stay apart for any number of classes; light enough for black letters.
    red, green, blue = colorsys.hls_to_rgb(label * 0.618 % 1, 0.65, 0.9)
    return round(255 * red), round(255 * green), round(255 * blue)
