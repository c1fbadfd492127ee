"""The user's own COCO files: given as two, or divided from one."""

import json
from pathlib import Path

import pytest

from pipeline.config import Choice
from pipeline.errors import ConfigError, UserError
from stages.data.source import Source


def document(images: int) -> dict[str, object]:
    """As many images, each with one box."""
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 8, "height": 8} for i in range(images)],
        "annotations": [{"id": i + 1, "image_id": i, "category_id": 1, "bbox": [1, 1, 3, 3]} for i in range(images)],
        "categories": [{"id": 1, "name": "thing"}],
    }


def source(settings: dict[str, object]) -> Source:
    """The source that a config makes."""
    choice = Choice.parse(Source, {"name": "coco", **settings})
    return choice.cls(choice.config)


def test_two_files_are_taken_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for name in ("a", "b"):
        (tmp_path / f"{name}.json").write_text("{}")
    files = [{"images": str(tmp_path / "images"), "annotations": str(tmp_path / f"{name}.json")} for name in "ab"]
    raw = source({"train": files[0], "val": files[1]}).write(tmp_path)
    assert raw.train.annotations == tmp_path / "a.json"
    assert raw.val.annotations == tmp_path / "b.json"
    assert raw.val.images == tmp_path / "images"


def test_one_file_is_divided_by_images(tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text(json.dumps(document(10)))
    (tmp_path / "out").mkdir()
    files = {"images": str(tmp_path), "annotations": str(tmp_path / "one.json")}
    raw = source({"train": files, "val_fraction": 0.3}).write(tmp_path / "out")
    parts = [json.loads(split.annotations.read_text()) for split in (raw.train, raw.val)]
    assert [len(part["images"]) for part in parts] == [7, 3]
    ids = [{image["id"] for image in part["images"]} for part in parts]
    assert ids[0] | ids[1] == set(range(10))
    for part, own in zip(parts, ids, strict=True):
        assert {annotation["image_id"] for annotation in part["annotations"]} == own
        assert part["categories"] == document(0)["categories"]


def test_groups_of_two_files_must_be_apart(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for name, images in (("a", 4), ("b", 3)):
        (tmp_path / f"{name}.json").write_text(json.dumps(document(images)))
    files = [{"images": str(tmp_path / "images"), "annotations": str(tmp_path / f"{name}.json")} for name in "ab"]
    with pytest.raises(UserError, match=r"train and val: 3 groups are in both \(0: 0.png and 0.png, .*AP on frames"):
        source({"train": files[0], "val": files[1], "group_by": r"^\d"}).write(tmp_path)


@pytest.mark.parametrize("both", [True, False])
def test_validation_must_come_from_somewhere_and_once(tmp_path: Path, both: bool) -> None:
    (tmp_path / "a.json").write_text("{}")
    files = {"images": str(tmp_path), "annotations": str(tmp_path / "a.json")}
    settings = {"train": files, **({"val": files, "val_fraction": 0.2} if both else {})}
    with pytest.raises(ConfigError, match="give either `val` or `val_fraction`"):
        source(settings)
