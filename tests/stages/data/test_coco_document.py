"""COCO files with masks and without boxes: the box is that of the mask."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask

from pipeline.errors import UserError
from stages.data.coco_document import mask_box, parse

PIXELS = np.zeros((20, 30), np.uint8)
PIXELS[4:9, 10:25] = 1
PIXELS[8, 24] = 0


def compressed() -> dict[str, object]:
    """Run lengths as COCO writes them for crowds of its own annotators."""
    rle = mask.encode(np.asfortranarray(PIXELS))
    return {"size": [20, 30], "counts": rle["counts"].decode()}


def plain() -> dict[str, object]:
    """Run lengths as a list, down the columns, zeros first."""
    flat = PIXELS.flatten(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    return {"size": [20, 30], "counts": np.diff([0, *edges, flat.size]).tolist()}


@pytest.mark.parametrize("segmentation", [compressed(), plain()], ids=["compressed", "plain"])
def test_run_lengths(segmentation: dict[str, object]) -> None:
    assert mask_box(segmentation) == ([10, 4, 15, 5], 74)


def test_polygons_reach_from_their_least_to_their_largest_coordinates() -> None:
    assert mask_box([[1.5, 2, 5, 2, 5, 8, 1.5, 8], [6, 6, 7, 6, 7, 9]]) == ([1.5, 2, 5.5, 7], 21 + 1.5)


def write(file: Path, *annotations: dict[str, object]) -> Path:
    rows = [{"id": i, "image_id": 1, "category_id": 1, **a} for i, a in enumerate(annotations, 1)]
    images = [{"id": 1, "file_name": "a.png", "width": 30, "height": 20}]
    file.write_text(json.dumps({"images": images, "annotations": rows, "categories": [{"id": 1, "name": "x"}]}))
    return file


def test_annotations_without_boxes_get_those_of_their_masks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = write(
        tmp_path / "a.json",
        {"segmentation": compressed(), "iscrowd": 1},
        {"bbox": [0, 0, 3, 3], "segmentation": [[1, 1, 5, 5, 1, 5]]},
        {"segmentation": [[1, 1, 5, 5, 1, 5]], "area": 7},
    )
    with caplog.at_level(logging.WARNING, "headstart"):
        crowd, boxed, polygon = parse(file)["annotations"]
    assert (list(crowd["bbox"]), crowd["area"], crowd["iscrowd"]) == ([10, 4, 15, 5], 74, 1)
    assert list(boxed["bbox"]) == [0, 0, 3, 3]
    assert "area" not in boxed
    assert (list(polygon["bbox"]), polygon["area"]) == ([1, 1, 4, 4], 7)
    assert "2 annotations have a mask and no box (annotation 1, annotation 3); the mask's box is taken" in caplog.text


@pytest.mark.parametrize("segmentation", [None, [], [[]], "mask", {"size": [20, 30], "counts": [600]}, {"counts": "x"}])
def test_neither_box_nor_mask(tmp_path: Path, segmentation: object) -> None:
    file = write(tmp_path / "a.json", {"segmentation": compressed()}, {"segmentation": segmentation})
    with pytest.raises(UserError, match=r"a.json: 1 x 'Field required' \(annotations\[1\].bbox\)"):
        parse(file)


def test_what_is_null_counts_as_missing(tmp_path: Path) -> None:
    file = write(
        tmp_path / "a.json",
        {"bbox": [0, 0, 3, 3], "area": None, "iscrowd": None},
        {"bbox": None, "segmentation": [[1, 1, 5, 5, 1, 5]]},
        {"bbox": [], "area": None, "segmentation": [[1, 1, 5, 5, 1, 5]]},
    )
    document = json.loads(file.read_text())
    document["images"][0] |= {"width": None, "height": None}
    file.write_text(json.dumps(document))
    found = parse(file)
    assert found["images"] == [{"id": 1, "file_name": "a.png"}]
    assert not {"area", "iscrowd"} & found["annotations"][0].keys()
    assert [list(a["bbox"]) for a in found["annotations"][1:]] == [[1, 1, 4, 4]] * 2
    assert [a["area"] for a in found["annotations"][1:]] == [8, 8]


@pytest.mark.parametrize("bbox", [None, []])
def test_an_empty_box_without_a_mask_is_refused(tmp_path: Path, bbox: object) -> None:
    file = write(tmp_path / "a.json", {"bbox": bbox})
    with pytest.raises(UserError, match=r"a.json: 1 x 'Field required' \(annotations\[0\].bbox\)"):
        parse(file)


@pytest.mark.parametrize("info", [None, [], "made by hand"])
def test_info_may_be_anything(tmp_path: Path, info: object) -> None:
    file = write(tmp_path / "a.json", {"bbox": [0, 0, 3, 3]})
    file.write_text(json.dumps({**json.loads(file.read_text()), "info": info}))
    assert len(parse(file)["annotations"]) == 1


def test_a_byte_order_mark_is_no_content(tmp_path: Path) -> None:
    file = write(tmp_path / "a.json", {"bbox": [0, 0, 3, 3]})
    file.write_text(file.read_text(), encoding="utf-8-sig")
    assert len(parse(file)["annotations"]) == 1
    file.write_text("[", encoding="utf-8-sig")
    with pytest.raises(UserError, match=r"a.json: 1 x 'Invalid JSON"):
        parse(file)
