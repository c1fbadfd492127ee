"""The dataset stage: what it writes, counts and fingerprints."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import UserError
from stages import dataset
from stages.artifacts.dataset import Dataset
from stages.data.coco import CocoSplit

BCCD = Path(__file__).parents[3] / "shared" / "data" / "bccd"
Make = Callable[..., Dataset]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Run the stage in a new folder."""

    def make(**settings: object) -> Dataset:
        directory = tmp_path / f"run{len(list(tmp_path.glob('run*')))}"
        directory.mkdir()
        return dataset.run(dataset.Config.model_validate(settings), directory).placed(directory)

    return make


def coco(digits: Dataset) -> dict[str, object]:
    """A source of the images and annotations of an artifact, as if they were a user's."""
    splits = {
        name: {"images": str(digits.folder(name)), "annotations": str(digits.annotations(name))}
        for name in ("train", "val")
    }
    return {"name": "coco", **splits}


SMALL = {"name": "digits", "train": 12, "val": 4}


def test_digits(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "headstart"):
        data = make(source=SMALL, size=[96, 128])
    assert data.classes == tuple("0123456789")
    assert data.category_ids == tuple(range(1, 11))
    assert (data.train.image_count, data.val.image_count) == (12, 4)
    assert data.train.images == "train"  # relative: the artifact can be moved
    assert sum(data.train.boxes_per_class.values()) == data.train.box_count > 12
    assert (data.image_spec().height, data.image_spec().width) == (96, 128)
    assert {path.name for path in data.directory.iterdir()} == {"train", "val", "train.json", "val.json", "ATTRIBUTION"}
    assert len(json.loads(data.annotations("train").read_text())["images"]) == 12
    assert "CC BY 2.0" in data.attribution
    table = next(message for message in caplog.messages if message.startswith("class"))
    assert table.splitlines()[-1].split() == ["images", "12", "4"]
    assert Dataset.model_validate_json(data.model_dump_json()).model_dump() == data.model_dump()


def test_fingerprint_is_of_the_content_not_of_the_place(make: Make, tmp_path: Path) -> None:
    digits = make(source=SMALL)
    original = make(source=coco(digits))
    assert original.train.images == str(digits.folder("train"))  # absolute: the images are the user's
    shutil.copytree(digits.directory, tmp_path / "copy")
    copied = make(source=coco(digits.placed(tmp_path / "copy")), size=64)
    assert copied.fingerprint == original.fingerprint
    image = tmp_path / "copy" / "val" / "000002.jpg"
    image.write_bytes((tmp_path / "copy" / "val" / "000001.jpg").read_bytes())
    assert make(source=coco(digits.placed(tmp_path / "copy"))).fingerprint != original.fingerprint


def test_findings_are_logged_and_kept(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    digits = make(source=SMALL)
    document = json.loads(digits.annotations("val").read_text())
    document["annotations"][0]["iscrowd"] = 1
    digits.annotations("val").write_text(json.dumps(document))
    with caplog.at_level(logging.WARNING, "headstart"):
        data = make(source=coco(digits))
    crowds = [problem for problem in data.problems if "crowd annotations" in problem]
    assert len(crowds) == 1
    assert crowds[0] in caplog.messages
    assert data.val.box_count == digits.val.box_count - 1


def test_refusal_is_a_user_error(make: Make) -> None:
    digits = make(source=SMALL)
    (digits.folder("train") / "000003.jpg").unlink()
    with pytest.raises(UserError, match="1 images missing"):
        make(source=coco(digits))


@pytest.mark.skipif(not BCCD.is_dir(), reason="needs ../shared/data/bccd, which is not here")
def test_bccd(make: Make) -> None:
    splits = {
        name: {"images": str(BCCD / "images"), "annotations": str(BCCD / "annotations" / f"instances_{name}.json")}
        for name in ("train", "val")
    }
    data = make(source={"name": "coco", **splits}, size=320)
    stats = json.loads((BCCD / "stats.json").read_text())
    assert data.problems == ()
    assert (data.train.image_count, data.val.image_count) == (stats["images"]["train"], stats["images"]["val"])
    assert data.train.boxes_per_class == {name: counts["train"] for name, counts in stats["classes"].items()}
    assert data.val.boxes_per_class == {name: counts["val"] for name, counts in stats["classes"].items()}
    split = CocoSplit(data.folder("val"), data.annotations("val"))
    sample = split.sample(0)
    assert sample.size == (480, 640)
    document = json.loads((BCCD / "annotations" / "instances_val.json").read_text())
    own = [a for a in document["annotations"] if a["image_id"] == sample.image_id]
    expected = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in own)]
    assert sample.boxes_N4.tolist() == expected
    assert [data.category_ids[label] for label in sample.labels_N.tolist()] == [a["category_id"] for a in own]
