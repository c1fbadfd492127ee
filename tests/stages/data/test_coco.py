"""CocoSplit: labels, clipping, subsets."""

import json
from pathlib import Path

import pytest
from PIL import Image

from deploy.errors import DeployError
from pipeline.errors import UserError
from stages.data.coco import CocoSplit

SIZE = (20, 30)


@pytest.fixture
def split(tmp_path: Path) -> CocoSplit:
    """Image i of 9 has i % 3 boxes, all different; annotations are shuffled among images; category ids have gaps."""
    images = [{"id": 100 - i, "file_name": f"{i}.png", "height": SIZE[0], "width": SIZE[1]} for i in range(9)]
    annotations = [
        {"image_id": 100 - i, "category_id": (90, 17)[k], "bbox": [i, k, 5, 5 + k], "iscrowd": 0}
        for k in range(2)
        for i in range(9)
        if k < i % 3
    ]
    annotations.append({"image_id": 95, "category_id": 17, "bbox": [0, 0, 5, 5], "iscrowd": 1})
    categories = [{"id": i, "name": str(i)} for i in (90, 3, 17)]
    for number, image in enumerate(images):
        Image.new("RGB", SIZE[::-1], (number, 0, 0)).save(tmp_path / str(image["file_name"]))
    file = tmp_path / "a.json"
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return CocoSplit(tmp_path, file)


def expected(i: int) -> tuple[list[list[float]], list[int]]:
    """Boxes and labels of image i; labels count categories by id: 3, 17, 90."""
    return [[i, k, i + 5, 5 + 2 * k] for k in range(i % 3)], [(2, 1)[k] for k in range(i % 3)]


def test_each_image_has_its_own_boxes(split: CocoSplit) -> None:
    assert len(split) == 9
    assert split.classes == 3
    assert [file.name for file in split.files] == [f"{i}.png" for i in range(9)]
    for i in range(9):
        sample = split[i]
        assert (sample.boxes_N4.tolist(), sample.labels_N.tolist()) == expected(i)
        assert sample.boxes_N4.shape == (i % 3, 4)
        assert sample.image_id == 100 - i
        assert sample.pixels_HWC[0, 0].tolist() == [i, 0, 0]
        assert sample.pixels_HWC.shape[:2] == sample.size == SIZE


def test_subset_is_drawn_by_its_seed_and_keeps_what_belongs_together(split: CocoSplit) -> None:
    part = split.subset(5, seed=3)
    assert part.image_ids == split.subset(5, seed=3).image_ids
    assert len({tuple(split.subset(5, seed=seed).image_ids) for seed in range(5)}) > 1
    assert len(part) == len(set(part.image_ids)) == 5
    for index, image_id in enumerate(part.image_ids):
        sample = part.sample(index)
        assert (sample.boxes_N4.tolist(), sample.labels_N.tolist()) == expected(100 - image_id)
        assert sample.pixels_HWC[0, 0].tolist() == [100 - image_id, 0, 0]
        assert part.files[index].name == f"{100 - image_id}.png"


def test_smaller_subset_lies_in_the_larger(split: CocoSplit) -> None:
    assert set(split.subset(3, seed=0).image_ids) < set(split.subset(6, seed=0).image_ids)


@pytest.mark.parametrize("count", [0, 10])
def test_subset_of_more_than_there_are(split: CocoSplit, count: int) -> None:
    with pytest.raises(UserError, match=f"{count} asked for, .* has 9; ask for 1 to 9"):
        split.subset(count, seed=0)


def test_an_image_that_changed_its_size_since_the_check_is_refused(split: CocoSplit) -> None:
    Image.new("RGB", (31, 20)).save(split.files[4])
    with pytest.raises(DeployError, match=r"4\.png: the image has 20 x 31 .* had 20 x 30 when the dataset was checked"):
        split.sample(4)


def test_no_annotations_at_all(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    images = [{"id": 1, "file_name": "a.png", "height": 4, "width": 4}]
    (tmp_path / "a.json").write_text(json.dumps({"images": images, "annotations": [], "categories": []}))
    assert CocoSplit(tmp_path, tmp_path / "a.json").sample(0).boxes_N4.shape == (0, 4)
