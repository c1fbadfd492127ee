"""Images with boxes: which boxes are right, and that the images are nobody's choice."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import numpy as np
from PIL import Image

from stages.evaluation.report.pictures import label_place, matched, strips

BOX, NEAR, FAR = [0.0, 0, 10, 10], [1.0, 0, 11, 10], [50.0, 50, 60, 60]


def match(found: list[list[float]], labels: list[int], true: list[list[float]], true_labels: list[int]) -> Any:
    """`matched` of lists."""
    return matched(np.array(found).reshape(-1, 4), labels, np.array(true).reshape(-1, 4), true_labels)


def test_right_needs_class_and_overlap() -> None:
    assert match([NEAR], [1], [BOX], [1]) == ({0}, [])
    assert match([NEAR], [2], [BOX], [1]) == (set(), [0])
    assert match([FAR], [1], [BOX], [1]) == (set(), [0])


def test_an_object_is_found_once() -> None:
    assert match([BOX, NEAR], [1, 1], [BOX], [1]) == ({0}, [])


def test_each_takes_what_it_overlaps_most() -> None:
    assert match([NEAR, BOX], [1, 1], [BOX, NEAR], [1, 1]) == ({0, 1}, [])
    assert match([], [], [BOX, FAR], [1, 1]) == (set(), [0, 1])


def test_strips_show_truth_and_models_on_spread_images(data: Any, story: Any) -> None:
    document = json.loads(data.annotations("val").read_text())
    perfect = [{**annotation, "score": 0.9} for annotation in document["annotations"]]
    unsure = [{**annotation, "score": 0.29} for annotation in document["annotations"]]
    made = strips(data, {"good": perfect, "unsure": unsure}, 4)
    assert [strip.file_name for strip in made] == ["0.png", "6.png", "13.png", "19.png"]
    for strip in made:
        objects = sum(f"{annotation['image_id']}.png" == strip.file_name for annotation in document["annotations"])
        assert [panel.caption for panel in strip.panels] == [
            f"ground truth: {objects}",
            f"good: {objects} of {objects} found",
            f"unsure: 0 of {objects} found",
        ]
        for panel in strip.panels:
            head, _, content = panel.uri.partition(",")
            assert head == "data:image/jpeg;base64"
            assert Image.open(io.BytesIO(base64.b64decode(content))).size == (440, 293)


def orange(panel: Any) -> int:
    """Pixels in the colour of a wrong box or its label."""
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(panel.uri.partition(",")[2]))), int)
    return int((np.abs(pixels - (255, 138, 31)).max(axis=2) < 40).sum())


def test_a_second_opinion_on_an_object_is_thin_and_has_no_label(data: Any) -> None:
    document = json.loads(data.annotations("val").read_text())
    sure = [{**annotation, "score": 0.9} for annotation in document["annotations"]]

    def wrong(score: float) -> list[Any]:
        others = {1: 3, 3: 7, 7: 1}
        return [
            {
                **one,
                "bbox": [one["bbox"][0] + 2, *one["bbox"][1:]],
                "category_id": others[one["category_id"]],
                "score": score,
            }
            for one in sure
        ]

    (strip,) = strips(data, {"right": sure, "second": sure + wrong(0.5), "first": sure + wrong(0.95)}, 1)
    truth, right, second, first = strip.panels
    count = truth.caption.removeprefix("ground truth: ")
    assert second.caption == f"second: {count} of {count} found, {count} wrong"
    assert second.uri != right.uri  # it is drawn
    assert orange(second) < orange(first) / 3


def test_labels_do_not_cover_each_other() -> None:
    box, size = (100.0, 100.0, 200.0, 200.0), (440, 440)
    above = label_place(box, 50, 20, size, [])
    assert above == (99, 80, 149, 100)
    below = label_place(box, 50, 20, size, [above])
    assert below == (99, 200, 149, 220)
    assert label_place(box, 50, 20, size, [above, below]) == (99, 102, 149, 122)
    assert label_place((420.0, 0.0, 440.0, 440.0), 50, 20, size, []) == (390, 2, 440, 22)


def test_more_images_than_there_are(data: Any) -> None:
    assert len(strips(data, {}, 1000)) == 20
    assert strips(data, {}, 0) == []
