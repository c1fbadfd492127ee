"""Files as cameras, scanners and print shops leave them: training and the device see the same pixels of each."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deploy.image import ImageSpec, decode
from stages.data.augment import AugmentConfig, place
from stages.data.coco import CocoSplit
from stages.data.coco_check import check
from stages.data.source import RawDataset, RawSplit

SIZE = (48, 64)  # height, width, upright


def photo() -> Image.Image:
    """Smooth, bright at the top left, and of another colour at each corner: a turn or a swap of channels shows."""
    y, x = np.mgrid[0 : SIZE[0], 0 : SIZE[1]]
    levels = np.stack([250 - 4 * y, 20 + 3 * x, 60 + y + x], -1)
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8))


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def save(kind: str, file: Path) -> Path:
    """Write the photo as a file of this kind; the name of the file."""
    image, grey = photo(), photo().convert("L")
    wide = (np.asarray(grey).astype(np.uint16) << 8) + 77
    match kind:
        case "16-bit grey PNG":
            Image.fromarray(wide).save(file.with_suffix(".png"))
        case "16-bit grey TIFF":
            Image.fromarray(wide).save(file.with_suffix(".tif"))
        case "grey JPEG":
            grey.save(file.with_suffix(".jpg"), quality=95)
        case "CMYK JPEG":
            image.convert("CMYK").save(file.with_suffix(".jpg"), quality=95)
        case "progressive JPEG":
            image.save(file.with_suffix(".jpg"), quality=95, progressive=True)
        case "turned JPEG":
            image.transpose(Image.Transpose.ROTATE_90).save(file.with_suffix(".jpg"), quality=95, exif=turned(6))
        case "mirrored JPEG":
            image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(file.with_suffix(".jpg"), quality=95, exif=turned(2))
        case "palette PNG":
            image.quantize(256).save(file.with_suffix(".png"))
        case "PNG with alpha":
            image.putalpha(100)
            image.save(file.with_suffix(".png"))
    return next(file.parent.glob(f"{file.name}.*"))


KINDS = (
    "16-bit grey PNG",
    "16-bit grey TIFF",
    "grey JPEG",
    "CMYK JPEG",
    "progressive JPEG",
    "turned JPEG",
    "mirrored JPEG",
    "palette PNG",
    "PNG with alpha",
)


@pytest.mark.parametrize("kind", KINDS)
def test_training_and_the_device_see_the_same_pixels(kind: str, tmp_path: Path) -> None:
    file = save(kind, tmp_path / "photo")
    images = [{"id": 1, "file_name": file.name, "height": SIZE[0], "width": SIZE[1]}]
    box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [8, 4, 30, 20], "area": 600, "iscrowd": 0}
    document = {"images": images, "annotations": [box], "categories": [{"id": 1, "name": "thing"}]}
    (tmp_path / "a.json").write_text(json.dumps(document))
    expected = np.asarray(photo().convert("L" if "grey" in kind else "RGB").convert("RGB")).astype(int)
    pixels = np.asarray(decode(file)).astype(int)
    assert pixels.shape == (*SIZE, 3)
    assert np.abs(pixels - expected).mean() < 5  # upright and of the right colours, but for the codec

    sample = CocoSplit(tmp_path, tmp_path / "a.json").sample(0)
    np.testing.assert_array_equal(sample.pixels_HWC, pixels)
    for spec in (ImageSpec(*SIZE, (1, 2, 3)), ImageSpec(32, 64, (1, 2, 3))):
        device_HWC, placement = spec.prepare(decode(file))
        placed = place(sample, spec, AugmentConfig(), np.random.default_rng(0))
        training_HWC = placed.canvas_HWC
        resized = placement.content != placement.original
        # torchvision's resize is at most a level from Pillow's; where nothing is resized, they are equal.
        assert np.abs(training_HWC.astype(int) - device_HWC).max() <= resized
        expected_box = placement.to_input(np.asarray([[8, 4, 38, 24]], np.float32))
        np.testing.assert_allclose(placed.targets()[0], expected_box, rtol=1e-6)


def test_the_check_takes_them_all_and_knows_their_upright_size(tmp_path: Path) -> None:
    splits = []
    for split, kinds in (("train", KINDS), ("val", ())):
        (tmp_path / split).mkdir()
        files = [save(kind, tmp_path / split / f"{number}") for number, kind in enumerate(kinds)]
        if not files:
            files = [tmp_path / split / "other.png"]
            Image.new("RGB", SIZE[::-1]).save(files[0])
        images = [{"id": i, "file_name": file.name} for i, file in enumerate(files)]
        boxes = [{"id": i + 1, "image_id": i, "category_id": 1, "bbox": [8, 4, 30, 20]} for i in range(len(files))]
        document = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "thing"}]}
        (tmp_path / f"{split}.json").write_text(json.dumps(document))
        splits.append(RawSplit(tmp_path / split, tmp_path / f"{split}.json"))
    checked = check(RawDataset(*splits))
    assert {(i["height"], i["width"]) for d in (checked.train, checked.val) for i in d["images"]} == {SIZE}
