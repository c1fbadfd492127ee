"""The image files in a folder, those of linked folders too, where `rglob` passes links over."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


def image_files(folder: Path) -> Iterator[Path]:
    """What has the suffix of an image, in a folder and below it.

    No folder is entered twice, and no link that leads to the folder itself, into it or above it: what is there is found
    where it lies.
    """
    top, entered = folder.resolve(), set[Path]()
    for root, names, files in os.walk(folder, followlinks=True):
        place = Path(root)
        real = place.resolve()
        around = real.is_relative_to(top) or top.is_relative_to(real)
        if real in entered or (around and place != folder and place.is_symlink()):
            names.clear()
            continue
        entered.add(real)
        names.sort()
        yield from (place / name for name in files if Path(name).suffix.lower() in SUFFIXES)
