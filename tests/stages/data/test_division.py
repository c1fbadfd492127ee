"""Splits at random: by images or by whole groups, the same for the same seed, and never through a group."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from pipeline.errors import UserError
from stages.data.coco_document import CocoDocument
from stages.data.division import DivisionConfig, check_apart, divide


def document(names: list[str]) -> CocoDocument:
    """As many images, each with one box."""
    return {
        "images": [{"id": i, "file_name": name, "width": 8, "height": 8} for i, name in enumerate(names)],
        "annotations": [
            {"id": i + 1, "image_id": i, "category_id": 1, "bbox": (1, 1, 3, 3)} for i in range(len(names))
        ],
        "categories": [{"id": 1, "name": "thing"}],
    }


def names(part: CocoDocument) -> list[str]:
    return [image["file_name"] for image in part["images"]]


VIDEOS = [f"images/v{video}_{frame:02d}.jpg" for video in range(6) for frame in range(5 + video)]


def config(**settings: object) -> DivisionConfig:
    return DivisionConfig.model_validate({"val_fraction": 0.3, **settings})


def test_division_depends_on_the_seed_alone() -> None:
    whole = document([f"{i}.png" for i in range(50)])
    chosen = [set(names(divide(whole, config(seed=seed))[1])) for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]
    assert len(chosen[0]) == 15


@pytest.mark.parametrize("seed", range(5))
def test_no_group_is_on_both_sides(seed: int) -> None:
    train, val = divide(document(VIDEOS), config(seed=seed, group_by=r"(v\d+)_"))
    sides = [{name.partition("_")[0] for name in names(part)} for part in (train, val)]
    assert not sides[0] & sides[1]
    assert sorted(names(train) + names(val)) == sorted(VIDEOS)
    assert 0 < len(names(val)) <= round(0.3 * len(VIDEOS))
    for part in (train, val):
        assert {a["image_id"] for a in part["annotations"]} == {image["id"] for image in part["images"]}


def test_without_groups_videos_are_torn_apart() -> None:
    """What the test above would see if groups did nothing."""
    train, val = divide(document(VIDEOS), config())
    assert {name.partition("_")[0] for name in names(train)} & {name.partition("_")[0] for name in names(val)}


def test_the_smallest_group_where_all_are_larger_than_the_fraction() -> None:
    train, val = divide(document(VIDEOS[:11]), config(val_fraction=0.1, group_by=r"v\d+"))
    assert {name[7:9] for name in names(val)} == {"v0"}
    assert {name[7:9] for name in names(train)} == {"v1"}


@pytest.mark.parametrize("kind", ["json", "csv"])
def test_groups_from_a_file(tmp_path: Path, kind: str) -> None:
    file = tmp_path / f"groups.{kind}"
    groups = {name if number % 2 else Path(name).name: f"{number % 3}" for number, name in enumerate(VIDEOS)}
    lines = ["group,file_name", *(f'{group},"{name}"' for name, group in groups.items())]
    file.write_text(json.dumps(groups) if kind == "json" else "\n".join(lines))
    _, val = divide(document(VIDEOS), config(val_fraction=0.4, group_file=str(file)))
    places = {number % 3 for number, name in enumerate(VIDEOS) if name in names(val)}
    assert len(places) == 1
    assert len(names(val)) == len([number for number in range(len(VIDEOS)) if number % 3 in places])


def test_images_of_no_group_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"group_by: 'v\[12\]': 32 images belong to no group \(images/v0_00.jpg, "):
        divide(document(VIDEOS), config(group_by="v[12]"))
    (tmp_path / "groups.json").write_text('{"a.jpg": 1}')
    with pytest.raises(UserError, match=r"group_file: .*groups.json: 1 images belong to no group \(b.jpg\)"):
        divide(document(["a.jpg", "b.jpg"]), config(group_file=str(tmp_path / "groups.json")))


def test_what_cannot_be_divided() -> None:
    with pytest.raises(UserError, match=r"val_fraction: 1 group, 'v', which cannot be divided"):
        divide(document(VIDEOS), config(group_by="v"))
    with pytest.raises(UserError, match=r"val_fraction: 1 images, which cannot be divided"):
        divide(document(["a.png"]), config())


def test_at_least_one_image_stays_on_each_side() -> None:
    for fraction in (0.01, 0.99):
        train, val = divide(document(["a.png", "b.png", "c.png"]), config(val_fraction=fraction))
        assert names(train)
        assert names(val)


def test_given_splits_are_apart_or_refused() -> None:
    grouped = config(group_by=r"v\d+")
    check_apart(document(VIDEOS[:5]), document(VIDEOS[5:]), grouped)
    with pytest.raises(UserError, match=r"1 groups are in both \(v0: images/v0_03.jpg and images/v0_04.jpg\)"):
        check_apart(document(VIDEOS[:4]), document(VIDEOS[4:]), grouped)


def test_settings_that_contradict_one_another(tmp_path: Path) -> None:
    (tmp_path / "g.json").write_text("{}")
    with pytest.raises(ValidationError, match="`group_by` or `group_file`, not both"):
        config(group_by="v", group_file=str(tmp_path / "g.json"))
    with pytest.raises(ValidationError, match="is no regular expression"):
        config(group_by="(")


def test_a_file_that_is_no_list_of_groups(tmp_path: Path) -> None:
    for name, text in (("a.json", "[1]"), ("b.csv", "name,group\na,1"), ("c.json", "{")):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=rf"group_file: .*{name} cannot be read"):
            divide(document(VIDEOS), config(group_file=str(tmp_path / name)))
