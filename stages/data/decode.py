"""Pixels of a training image, bit for bit those of the device's Pillow, from a faster decoder where there is one.

    bytes --upright JPEG of YCbCr or grey--> simplejpeg (libjpeg-turbo)  --\
          --anything else------------------> deploy.image.decode (Pillow) --> uint8 (H, W, 3)

Both decoders are libjpeg-turbo, but Pillow also unpacks to four bytes a pixel and packs again. Of the decoders that were
bit-identical on 2,597 photographs simplejpeg is the fastest (docs/loading.md has the numbers).
"""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from deploy.image import decode
from pipeline.log import logger

_START_OF_SCAN, _EXIF_OR_XMP = b"\xda", b"\xe1"


def decode_pixels(file: Path, buffer: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
    """The upright RGB image in a file as (height, width, 3); in `buffer`, contiguous and of that size, where its decoder can
    write there. Raises DeployError, naming the file, where `decode` does."""
    try:
        data = file.read_bytes()
    except OSError:
        return np.array(decode(file))  # says why
    if _is_plain(data) and decoders_agree():
        try:
            return simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False, buffer=buffer)  # type: ignore[no-any-return]
        except ValueError:  # damaged, or a kind it does not know: Pillow decides whether it can be read
            pass
    return np.array(decode(file))


def _is_plain(data: bytes) -> bool:
    """Whether it is a JPEG of YCbCr or grey with nothing in its header that could turn it or say that its colours are
    others (Exif and XMP lie in APP1)."""
    place = 2 if data.startswith(b"\xff\xd8") else len(data)
    while data[place : place + 1] == b"\xff":
        marker = data[place + 1 : place + 2]
        if marker == _START_OF_SCAN:
            return _has_known_colours(data)
        if marker == _EXIF_OR_XMP:
            return _is_upright(data)
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return False


def _has_known_colours(data: bytes) -> bool:
    try:
        return simplejpeg.decode_jpeg_header(data)[2] in ("YCbCr", "Gray")
    except ValueError:
        return False


def _is_upright(data: bytes) -> bool:
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.getexif().get(0x0112, 1) == 1 and _has_known_colours(data)
    except Exception:  # Pillow's parsers raise nearly anything on damaged bytes; it will say so itself
        return False


@cache
def decoders_agree() -> bool:
    """Whether both decoders give the same bits here, where either may be another build than the one that was tested.

    Tried once a process on noise in all three ways in which colours are stored.
    """
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 53, 3), np.uint8))
    for subsampling in ("4:4:4", "4:2:2", "4:2:0"):
        file = io.BytesIO()
        noise.save(file, "JPEG", quality=90, subsampling=subsampling)
        fast = simplejpeg.decode_jpeg(file.getvalue(), "RGB", fastdct=False, fastupsample=False)
        if not np.array_equal(fast, np.asarray(decode(file.getvalue()))):
            logger.warning("images: simplejpeg and Pillow decode differently here; Pillow decodes, which takes longer")
            return False
    return True
