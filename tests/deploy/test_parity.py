import json

import pytest

from deploy.parity import FLOAT32, Tolerance, compare

LOOSE = Tolerance(box_px=1.0, score=0.01)
CAT, DOG = ([0, 0, 20, 20], 0.9, 0), ([40, 40, 60, 60], 0.5, 1)


def moved(detection, by=0.0, score=0.0, label=None):
    box, old, kind = detection
    return [side + by for side in box], old + score, kind if label is None else label


def test_the_same_is_the_same(detections):
    found = compare([detections(CAT, DOG), detections()], [detections(CAT, DOG), detections()])
    assert found.verdict
    assert (found.images, found.matched, found.unmatched, found.max_box_px, found.max_score) == (2, 2, 0, 0, 0)
    assert "2 detections in 2 images matched" in found.sentence
    json.dumps(found.to_dict())


@pytest.mark.parametrize(("by", "verdict"), [(0.9, True), (1.1, False)])
def test_boxes_may_move_by_the_tolerance(detections, by, verdict):
    found = compare([detections(CAT)], [detections(moved(CAT, by))], LOOSE)
    assert found.verdict is verdict
    assert found.max_box_px == pytest.approx(by, rel=1e-5)
    assert ("a box moved by 1.1 px, 1 allowed" in found.sentence) is not verdict


@pytest.mark.parametrize(("by", "verdict"), [(0.009, True), (0.011, False)])
def test_scores_may_move_by_the_tolerance(detections, by, verdict):
    found = compare([detections(CAT)], [detections(moved(CAT, score=-by))], LOOSE)
    assert found.verdict is verdict
    assert ("a score moved" in found.sentence) is not verdict


def test_another_label_is_a_mismatch_not_a_loss(detections):
    found = compare([detections(CAT, DOG)], [detections(moved(CAT, label=1), DOG)])
    assert (found.verdict, found.label_mismatches, found.unmatched) == (False, 1, 0)
    assert "1 with another label" in found.sentence


def test_the_right_label_is_taken_before_the_better_overlap(detections):
    cat, dog = ([0, 0, 20, 20], 0.9, 0), ([1, 0, 21, 20], 0.9, 1)
    # The other predictor's boxes moved so that each lies nearer to the reference of the other class.
    found = compare([detections(cat, dog)], [detections(moved(cat, 0.6), moved(dog, -0.6))], LOOSE)
    assert (found.verdict, found.label_mismatches, found.matched) == (True, 0, 2)


def test_equal_scores_may_swap(detections):
    a, b = ([0, 0, 20, 20], 0.5, 0), ([40, 40, 60, 60], 0.5, 0)
    assert compare([detections(a, b)], [detections(b, a)], FLOAT32).verdict


def test_equal_boxes_are_told_apart_by_their_scores(detections):
    high, low = ([0, 0, 20, 20], 0.9, 0), ([0, 0, 20, 20], 0.3, 0)
    assert compare([detections(high, low)], [detections(low, high)], FLOAT32).verdict


@pytest.mark.parametrize("swapped", [False, True])
def test_a_lost_detection_is_excused_only_at_the_threshold(detections, swapped):
    def verdict(score):
        pair = [detections(CAT, ([40, 40, 60, 60], score, 1))], [detections(CAT)]
        return compare(*(reversed(pair) if swapped else pair), LOOSE, score_threshold=0.3)

    assert verdict(0.305).verdict
    assert verdict(0.305).excused == 1
    assert not verdict(0.32).verdict
    assert verdict(0.32).unmatched == 1


def test_a_lost_detection_is_excused_at_the_end_of_a_full_image(detections):
    last, other = ([40, 40, 60, 60], 0.5, 0), ([80, 80, 90, 90], 0.5, 0)
    pair = [detections(CAT, last)], [detections(CAT, other)]
    assert not compare(*pair, LOOSE).verdict
    found = compare(*pair, LOOSE, max_detections=2)
    assert (found.verdict, found.excused) == (True, 2)


@pytest.mark.parametrize(("side", "unmatched"), [(0.9, 0), (1.1, 1)])
def test_a_box_of_hardly_a_size_may_be_none_for_the_other(side, unmatched, detections):
    found = compare([detections(CAT, ([40, 40, 40 + side, 60], 0.5, 1))], [detections(CAT)], LOOSE)
    assert (found.unmatched, found.excused) == (unmatched, 1 - unmatched)


def test_a_box_elsewhere_is_no_partner(detections):
    found = compare([detections(CAT)], [detections(moved(CAT, 15))], LOOSE)
    assert (found.verdict, found.matched, found.unmatched) == (False, 0, 2)


def test_nothing_compared_is_no_parity(detections):
    found = compare([detections()], [detections()])
    assert not found.verdict
    assert "no detection was compared" in found.sentence


def test_the_images_must_be_the_same(detections):
    with pytest.raises(ValueError, match="1 reference images but 0 others"):
        compare([detections()], [])


@pytest.mark.parametrize("by", [3, 8])  # near enough for a pair, and not
@pytest.mark.parametrize("swapped", [False, True])
def test_an_overlap_at_the_limit_of_nms_is_excused_where_both_had_both(swapped, by, detections):
    high, low = CAT, moved(CAT, by, score=-0.05)  # of two that overlap by NMS's limit one side keeps this, one that
    kept, before = ([detections(high, DOG)], [detections(low, DOG)]), ([detections(high, low, DOG)],) * 2
    kept = tuple(reversed(kept)) if swapped else kept
    assert not compare(*kept, FLOAT32).verdict
    found = compare(*kept, FLOAT32, candidates=before)
    assert (found.verdict, found.matched, found.excused, found.max_box_px) == (True, 1, 2, 0)


@pytest.mark.parametrize("by", [3, 8])
def test_what_one_side_never_had_is_no_matter_of_nms(by, detections):
    high, low = CAT, moved(CAT, by, score=-0.05)
    kept = [detections(high, DOG)], [detections(low, DOG)]
    assert not compare(*kept, FLOAT32, candidates=kept).verdict
    fewer = [detections(high, DOG)], [detections(DOG)]
    found = compare(*fewer, FLOAT32, candidates=fewer)
    assert (found.verdict, found.unmatched) == (False, 1)
    relabelled = [detections(high, moved(low, label=1), DOG)]
    assert not compare(*kept, FLOAT32, candidates=(relabelled, relabelled)).verdict
