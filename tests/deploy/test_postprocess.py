import sys

import numpy as np
import pytest

from deploy.backend import Candidates
from deploy.detections import Detections
from deploy.errors import DeployError
from deploy.image import Placement
from deploy.postprocess import detect, suppress

PLACEMENT = Placement(original=(128, 128), content=(64, 64))


def candidates(boxes, scores, labels):
    return Candidates(
        np.asarray(boxes, np.float32)[None], np.asarray(scores, np.float32)[None], np.asarray(labels)[None]
    )


def plain_nms(boxes, groups, threshold, limit):
    """NMS as it is told: one box after the other."""
    kept = []
    for index, (x1, y1, x2, y2) in enumerate(boxes):
        for other in kept:
            a1, b1, a2, b2 = boxes[other]
            inter = max(min(x2, a2) - max(x1, a1), 0) * max(min(y2, b2) - max(y1, b1), 0)
            union = (x2 - x1) * (y2 - y1) + (a2 - a1) * (b2 - b1) - inter
            if groups[index] == groups[other] and inter > threshold * union:
                break
        else:
            kept.append(index)
    return kept[:limit]


@pytest.mark.parametrize("count", [0, 1, 127, 128, 129, 500])
@pytest.mark.parametrize("limit", [1, 60, 1000])
def test_nms_equals_the_plain_loop(count, limit):
    rng = np.random.default_rng(count)
    # Whole pixels and few positions: many exact duplicates and equal overlaps.
    corner = rng.integers(0, 40, (count, 2)) * 4
    boxes = np.concatenate([corner, corner + rng.integers(1, 8, (count, 2)) * 4], axis=1).astype(np.float32)
    groups = rng.integers(0, 3, count)
    assert suppress(boxes, groups, 0.5, limit).tolist() == plain_nms(boxes, groups, 0.5, limit)


def test_an_overlap_equal_to_the_threshold_survives():
    boxes = np.asarray([[0, 0, 10, 10], [0, 0, 10, 5]], np.float32)  # IoU 0.5
    assert suppress(boxes, np.zeros(2, np.int64), 0.5, 10).tolist() == [0, 1]
    assert suppress(boxes, np.zeros(2, np.int64), 0.49, 10).tolist() == [0]


def test_a_suppressed_box_suppresses_nobody():
    boxes = np.asarray([[0, 0, 10, 10], [4, 0, 14, 10], [8, 0, 18, 10]], np.float32)
    assert suppress(boxes, np.zeros(3, np.int64), 0.4, 10).tolist() == [0, 2]


def test_classes_do_not_suppress_each_other_unless_asked(new_contract):
    found = candidates([[0, 0, 10, 10], [0, 0, 10, 10]], [0.9, 0.8], [0, 1])
    assert detect(found, new_contract(), PLACEMENT).labels.tolist() == [0, 1]
    assert detect(found, new_contract(class_agnostic_nms=True), PLACEMENT).labels.tolist() == [0]


def test_boxes_arrive_in_the_original_sorted_and_typed(contract):
    found = candidates([[20, 20, 30, 30], [0, 0, 10, 5]], [0.5, 0.9], [1, 0])
    detections = detect(found, contract, PLACEMENT)
    np.testing.assert_array_equal(detections.boxes_xyxy, [[0, 0, 20, 10], [40, 40, 60, 60]])
    np.testing.assert_array_equal(detections.scores, np.asarray([0.9, 0.5], np.float32))
    assert detections.labels.tolist() == [0, 1]


def test_equal_scores_keep_the_order_of_the_graph(contract):
    boxes = [[10 * i, 0, 10 * i + 5, 5] for i in range(6)]
    detections = detect(candidates(boxes, [0.5] * 6, [0] * 6), contract, PLACEMENT)
    assert detections.boxes_xyxy[:, 0].tolist() == [0, 20, 40, 60, 80, 100]


def test_scores_must_exceed_the_threshold_and_the_call_overrides_the_contract(new_contract):
    found = candidates([[0, 0, 5, 5], [20, 0, 25, 5], [40, 0, 45, 5]], [0.75, 0.5, 0.25], [0, 0, 0])
    contract = new_contract(score_threshold=0.5)
    assert len(detect(found, contract, PLACEMENT)) == 1
    assert len(detect(found, contract, PLACEMENT, score_threshold=0.0)) == 3
    assert len(detect(found, contract, PLACEMENT, score_threshold=0.0, max_detections=2)) == 2


def test_boxes_are_clipped_to_the_content_before_nms(contract):
    # Of a 64 x 32 content. Unclipped the two overlap by 10/90, clipped they are one box.
    placement = Placement(original=(32, 64), content=(32, 64))
    found = candidates([[0, 22, 10, 64], [0, 22, 10, 32], [0, 40, 10, 60]], [0.9, 0.8, 0.7], [0, 0, 0])
    detections = detect(found, contract, placement)
    np.testing.assert_array_equal(detections.boxes_xyxy, [[0, 22, 10, 32]])


def test_boxes_without_size_and_not_finite_ones_are_dropped(contract):
    nan, inf = float("nan"), float("inf")
    boxes = [[5, 5, 5, 9], [nan, 0, 9, 9], [9, 9, 0, 0], [0, 0, inf, 9]]
    detections = detect(candidates(boxes, [0.9, 0.9, nan, 0.8], [0, 0, 0, 0]), contract, PLACEMENT)
    np.testing.assert_array_equal(detections.boxes_xyxy, [[0, 0, 128, 18]])  # the infinite side is clipped


@pytest.mark.parametrize("nms", ["graph", "none"])
def test_nothing_is_suppressed_twice(new_contract, nms):
    found = candidates([[0, 0, 10, 10], [0, 0, 10, 10]], [0.9, 0.8], [0, 0])
    assert len(detect(found, new_contract(nms=nms), PLACEMENT)) == 2
    assert len(detect(found, new_contract(nms=nms, max_detections=1), PLACEMENT)) == 1


def test_one_image_at_a_time(contract):
    two = Candidates(np.zeros((2, 3, 4), np.float32), np.zeros((2, 3), np.float32), np.zeros((2, 3), np.int64))
    with pytest.raises(ValueError, match="one image"):
        detect(two, contract, PLACEMENT)
    assert len(detect(two.image(1), contract, PLACEMENT)) == 0


def test_candidates_must_fit_together():
    with pytest.raises(ValueError, match="candidates"):
        Candidates(np.zeros((2, 3, 4), np.float32), np.zeros((2, 3), np.float32), np.zeros((2, 4), np.int64))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"boxes_xyxy": np.zeros((2, 4), np.float32)}, r"boxes_xyxy must be float32 of shape \(1, 4\)"),
        ({"boxes_xyxy": np.zeros((1, 4))}, "given float64"),
        ({"boxes_xyxy": np.full((1, 4), np.nan, np.float32)}, "finite"),
        ({"boxes_xyxy": np.asarray([[5, 0, 4, 1]], np.float32)}, "x1 <= x2"),
        ({"labels": np.asarray([-1])}, "negative"),
        ({"labels": np.zeros(1, np.int32)}, "labels must be int64"),
    ],
)
def test_detections_are_checked(changes, message):
    right = {
        "boxes_xyxy": np.zeros((1, 4), np.float32),
        "scores": np.ones(1, np.float32),
        "labels": np.zeros(1, np.int64),
    }
    with pytest.raises(ValueError, match=message):
        Detections(**(right | changes))


def test_detections_as_json_and_back(detections):
    one = detections(([1, 2, 3.5, 4], 0.75, 1))
    rows = one.to_list(["cat", "dog"])
    assert rows == [{"box_xyxy": [1.0, 2.0, 3.5, 4.0], "score": 0.75, "label": 1, "class": "dog"}]
    back = Detections.from_list(rows)
    np.testing.assert_array_equal(back.boxes_xyxy, one.boxes_xyxy)
    assert len(Detections.from_list([])) == 0
    with pytest.raises(DeployError, match="rows of box_xyxy"):
        Detections.from_list([{"score": 1}])


def test_detections_for_supervision(detections):
    """Skipped where supervision, or the OpenCV it imports, is not installed; neither is needed for anything else."""
    pytest.importorskip("supervision", exc_type=ImportError)
    one = detections(([1, 2, 3, 4], 0.9, 1), ([5, 6, 7, 8], 0.5, 0))
    found = one.to_supervision(["cat", "dog"])
    np.testing.assert_array_equal(found.xyxy, one.boxes_xyxy)
    np.testing.assert_array_equal(found.confidence, one.scores)
    np.testing.assert_array_equal(found.class_id, one.labels)
    assert found["class_name"].tolist() == ["dog", "cat"]
    assert "class_name" not in one.to_supervision().data
    assert len(detections().to_supervision(["cat"])) == 0


def test_without_supervision_the_error_says_so(detections, monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(DeployError, match="pip install supervision"):
        detections().to_supervision()


def test_a_file_with_nms_inside_is_not_asked_for_what_it_dropped(new_contract):
    contract = new_contract(nms="graph", score_threshold=0.3, evaluation_score_threshold=0.05)
    found = candidates([[0, 0, 10, 10], [0, 0, 10, 10]], [0.9, 0.2], [0, 0])
    assert len(detect(found, contract, PLACEMENT)) == 1
    assert len(detect(found, contract, PLACEMENT, score_threshold=0.05)) == 2  # nobody suppresses again
    with pytest.raises(DeployError, match=r"keeps scores above 0\.05, given a threshold of 0\.01 and 4 detections"):
        detect(found, contract, PLACEMENT, score_threshold=0.01, max_detections=5)
