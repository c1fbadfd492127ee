"""The fast decoder gives Pillow's bits, for every kind of file, or leaves it to Pillow."""

import io
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from deploy.errors import DeployError
from deploy.image import decode
from stages.data import decode as module
from stages.data.decode import decode_pixels, decoders_agree

PHOTOGRAPHS = Path(__file__).parents[4] / "shared/data"


def picture(height: int = 61, width: int = 83) -> Image.Image:
    """Smooth and noisy parts in colour."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([3 * x, 4 * y, x + y], -1) % 256 + rng.integers(-20, 20, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


KINDS = {
    "4:4:4": {"subsampling": "4:4:4"},
    "4:2:2": {"subsampling": "4:2:2"},
    "4:2:0": {"subsampling": "4:2:0"},
    "progressive": {"progressive": True},
    "restart markers": {"restart_marker_rows": 1},
    "poor": {"quality": 5},
    "upright by Exif": {"exif": turned(1)},
    "turned by Exif": {"exif": turned(6)},
    "RGB": {"keep_rgb": True},
}


def check(file: Path) -> None:
    np.testing.assert_array_equal(decode_pixels(file), np.asarray(decode(file)))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each image that the fast decoder gave."""
    calls: list[int] = []
    fast = simplejpeg.decode_jpeg

    def counting(data: bytes, *args: object, **kwargs: object) -> object:
        found = fast(data, *args, **kwargs)
        calls.append(len(data))
        return found

    assert decoders_agree()
    monkeypatch.setattr(module.simplejpeg, "decode_jpeg", counting)
    return calls


@pytest.mark.parametrize("kind", KINDS)
def test_jpeg(tmp_path: Path, kind: str, counted: list[int]) -> None:
    picture().save(tmp_path / "a.jpg", **KINDS[kind])
    check(tmp_path / "a.jpg")
    assert len(counted) == (kind not in ("turned by Exif", "RGB"))


@pytest.mark.parametrize(("mode", "fast"), [("L", True), ("CMYK", False)])
def test_jpeg_of_other_colours(tmp_path: Path, mode: str, fast: bool, counted: list[int]) -> None:
    picture().convert(mode).save(tmp_path / "a.jpg")
    check(tmp_path / "a.jpg")
    assert len(counted) == fast


def test_turned_by_xmp(tmp_path: Path, counted: list[int]) -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="6"/></x:xmpmeta>'
    picture().save(tmp_path / "a.jpg", xmp=xmp)
    check(tmp_path / "a.jpg")
    assert decode_pixels(tmp_path / "a.jpg").shape == (83, 61, 3)
    assert not counted


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "I;16", "1"])
def test_png(tmp_path: Path, mode: str) -> None:
    image = picture().convert("L").convert("I;16") if mode == "I;16" else picture().convert(mode)
    image.save(tmp_path / "a.png")
    check(tmp_path / "a.png")


def test_a_name_says_nothing(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.jpg", "PNG")
    check(tmp_path / "a.jpg")


@pytest.mark.parametrize("length", [0, 1, 2, 3, 20, 300, -50])
def test_damaged_files_are_refused_as_by_the_device(tmp_path: Path, length: int) -> None:
    file = io.BytesIO()
    picture().save(file, "JPEG")
    (tmp_path / "a.jpg").write_bytes(file.getvalue()[:length])
    with pytest.raises(DeployError, match=r"a\.jpg: the image cannot be read"):
        decode_pixels(tmp_path / "a.jpg")
    with pytest.raises(DeployError, match="no such image file"):
        decode_pixels(tmp_path / "b.jpg")


def test_into_a_buffer(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.jpg")
    canvas_HWC = np.zeros((80, 83, 3), np.uint8)
    found_HWC = decode_pixels(tmp_path / "a.jpg", canvas_HWC[:61])
    assert np.shares_memory(found_HWC, canvas_HWC)
    np.testing.assert_array_equal(canvas_HWC[:61], np.asarray(decode(tmp_path / "a.jpg")))


def test_another_build_is_found_out(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    fast = simplejpeg.decode_jpeg
    monkeypatch.setattr(module.simplejpeg, "decode_jpeg", lambda *a, **k: fast(*a, **k) ^ 1)
    assert not decoders_agree.__wrapped__()
    assert "simplejpeg and Pillow decode differently here" in caplog.text


@pytest.mark.skipif(not PHOTOGRAPHS.is_dir(), reason="no real photographs beside the checkout (../shared/data)")
@pytest.mark.parametrize("name", ["coco128", "bccd", "voc20-mix-320"])
def test_real_photographs(name: str) -> None:
    files = sorted((PHOTOGRAPHS / name / "images").rglob("*.jpg"))
    for file in files[:: max(1, len(files) // 12)]:
        check(file)
