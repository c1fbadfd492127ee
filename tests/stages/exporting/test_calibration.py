"""Training images set apart: by seed, by their pixels, and none that is a validation image."""

import json
import shutil

import pytest
from PIL import Image

from pipeline.errors import UserError
from stages.exporting.calibration import annotations_of, pixels, set_apart


@pytest.fixture
def copied(tmp_path, digits):
    """A copy of the dataset that a test may spoil."""
    shutil.copytree(digits.directory, tmp_path / "data")
    return digits.placed(tmp_path / "data", name="data", key="copied")


def hashes(pictures):
    return {one.sha256 for one in pictures}


def test_the_seed_decides(digits):
    first, again, other = (set_apart(digits, 10, 10, seed) for seed in (0, 0, 1))
    assert first == again
    assert first.sha256 == again.sha256 != other.sha256
    assert len(hashes(first.calibration)) == len(hashes(first.held_out)) == 10
    assert not hashes(first.calibration) & hashes(first.held_out)


def test_none_is_a_validation_image(digits):
    apart = set_apart(digits, 20, 20, 0)
    validation = {pixels(file) for file in digits.folder("val").iterdir()}
    assert apart.compared_with == len(validation) == 12
    assert not (hashes(apart.calibration) | hashes(apart.held_out)) & validation
    assert apart.left_out == ()


def test_a_copy_under_another_name_and_format_is_left_out(copied):
    """As users have them: the same photograph in both folders, saved anew."""
    source = next(iter(sorted(copied.folder("val").iterdir())))
    train = json.loads(copied.annotations("train").read_text())
    record = train["images"][7]
    Image.open(source).save(copied.folder("train") / "copy.png")
    record["file_name"] = "copy.png"
    copied.annotations("train").write_text(json.dumps(train))
    apart = set_apart(copied, 20, 19, 0)
    assert apart.left_out == (f"copy.png = {source.name}",)
    with pytest.raises(
        UserError, match="39 of 40 training images differ from one another and from all validation images"
    ):
        set_apart(copied, 20, 20, 0)


def test_the_list_is_written(tmp_path, digits):
    apart = set_apart(digits, 3, 2, 0)
    apart.write(tmp_path / "calibration.json")
    told = json.loads((tmp_path / "calibration.json").read_text())
    assert told["sha256"] == apart.sha256
    assert [len(told[name]) for name in ("calibration", "held_out")] == [3, 2]
    for one in told["calibration"]:
        assert pixels(digits.folder("train") / one["file_name"]) == one["sha256"]


def test_annotations_of_a_few(tmp_path, digits):
    apart = set_apart(digits, 1, 4, 0)
    annotations_of(apart.held_out, digits, tmp_path / "few.json")
    few = json.loads((tmp_path / "few.json").read_text())
    ids = {image["id"] for image in few["images"]}
    whole = json.loads(digits.annotations("train").read_text())["annotations"]
    assert len(ids) == 4
    assert few["annotations"] == [one for one in whole if one["image_id"] in ids]
