"""The built-in dataset: the same bits for the same seed, nothing shared between train and val, boxes on the plates."""

import json
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stages.data.source import RawDataset
from stages.data.sources import digits
from stages.data.sources.digits import Digits


def make(directory: Path, **settings: int) -> RawDataset:
    """Write a small one."""
    directory.mkdir(parents=True, exist_ok=True)
    return Digits(Digits.Config.model_validate({"train": 12, "val": 4, **settings})).write(directory)


def digests(directory: Path) -> dict[str, str]:
    """Relative path to sha256 of every file."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> RawDataset:
    return make(tmp_path_factory.mktemp("digits"))


def test_same_seed_same_bits_other_seed_others(made: RawDataset, tmp_path: Path) -> None:
    make(tmp_path / "again")
    first = digests(made.train.images.parent)
    assert len(first) == 12 + 4 + 2 + 1
    assert digests(tmp_path / "again") == first
    make(tmp_path / "other", seed=1)
    assert digests(tmp_path / "other")["train/000001.jpg"] != first["train/000001.jpg"]


def test_an_image_does_not_depend_on_how_many_there_are(made: RawDataset, tmp_path: Path) -> None:
    make(tmp_path, train=3, val=1)
    few, many = digests(tmp_path), digests(made.train.images.parent)
    assert {name: few[name] for name in few if name.endswith(".jpg")}.items() <= many.items()


def test_no_digit_and_no_part_of_a_photograph_is_shared() -> None:
    train, val = digits.materials(0)
    assert len(train.digits_D88) == 1258
    assert len(val.digits_D88) == 539
    scans = [{scan.tobytes() for scan in material.digits_D88} for material in (train, val)]
    assert len(scans[0] | scans[1]) == 1797  # every scan differs from all others, so that none is on both sides
    sizes = [[photo.size for photo in material.photos] for material in (train, val)]
    assert sizes == [[(384, 427)] * 2, [(256, 427)] * 2]
    from sklearn.datasets import load_sample_images

    for left, right, whole in zip(train.photos, val.photos, load_sample_images().images, strict=True):
        np.testing.assert_array_equal(np.concatenate([np.asarray(left), np.asarray(right)], axis=1), whole)


def test_plates_are_as_the_recipe_says(made: RawDataset) -> None:
    document = json.loads(made.train.annotations.read_text())
    assert [category["name"] for category in document["categories"]] == [str(digit) for digit in range(10)]
    by_image: dict[int, list[list[int]]] = {}
    for annotation in document["annotations"]:
        by_image.setdefault(annotation["image_id"], []).append(annotation["bbox"])
    assert set(by_image) == set(range(1, 13))
    for boxes in by_image.values():
        assert 1 <= len(boxes) <= 5
        covered = np.zeros((128, 128), np.int64)
        for x, y, width, height in boxes:
            assert round((width * height) ** 0.5 + 0.5) >= 18
            assert (width * height) ** 0.5 <= 44.5
            assert abs(np.log(width / height)) < 0.2 + 0.06  # sides are rounded to pixels
            covered[y : y + height, x : x + width] += 1
        assert covered.max() == 1
        assert covered.sum() == sum(width * height for _, _, width, height in boxes)  # none leaves the image


def test_box_is_the_plate(made: RawDataset) -> None:
    """A plate has no noise and its rim is one colour, the photograph around it has sigma 8."""
    document = json.loads(made.train.annotations.read_text())
    names = {image["id"]: image["file_name"] for image in document["images"]}
    for annotation in document["annotations"]:
        pixels = np.asarray(Image.open(made.train.images / names[annotation["image_id"]]), np.float64)
        x, y, width, height = annotation["bbox"]
        plate = pixels[y : y + height, x : x + width]
        rim = np.concatenate([plate[0, 1:-1], plate[-1, 1:-1], plate[1:-1, 0], plate[1:-1, -1]])
        assert rim.mean() > 130
        inside, level = plate.reshape(-1, 3).mean(axis=1), np.median(rim, axis=0).mean()
        assert level - inside.min() > 50  # there is ink on it


def test_attribution_is_kept(made: RawDataset) -> None:
    text = (made.train.images.parent / "ATTRIBUTION").read_text()
    assert text == made.attribution
    for part in ("CC BY 2.0", "danielbuechele/6061409035", "vultilion/6056698931", "10.24432/C50P49"):
        assert part in text
