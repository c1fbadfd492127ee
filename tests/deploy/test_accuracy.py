import json
import sys

import numpy as np
import pytest

from deploy import accuracy
from deploy.accuracy import STATISTICS, coco_results, crosscheck, evaluate, evaluate_predictor
from deploy.errors import DeployError
from deploy.predictor import Predictor

A, B, C = [0, 0, 10, 10], [20, 20, 10, 10], [40, 40, 10, 10]


def result(image_id, category_id, bbox, score):
    return {"image_id": image_id, "category_id": category_id, "bbox": bbox, "score": score}


@pytest.fixture
def random_case(tmp_path, new_annotations):
    """Crowds, tied scores, two classes, empty images, small and medium objects: where evaluators may differ."""
    rng = np.random.default_rng(3)
    places = zip(rng.integers(1, 19, 60).tolist(), rng.choice([17, 18], 60).tolist(), strict=True)
    boxes = [(image, category, rng.uniform(1, 45, 4).tolist()) for image, category in places]
    file = new_annotations(tmp_path / "truth.json", boxes, images=20)
    dataset = json.loads(file.read_text())
    for annotation in dataset["annotations"][::9]:
        annotation["iscrowd"] = 1
    file.write_text(json.dumps(dataset))
    results = [
        result(image, category, (box + rng.normal(0, 2, 4)).clip(1).tolist(), round(float(rng.uniform()), 1))
        for image, category, box in boxes * 2
    ]
    return results, file


@pytest.mark.parametrize("evaluator", ["hotcoco", "pycocotools"])
def test_ap_worked_by_hand(tmp_path, new_annotations, evaluator):
    # A hit, a miss, a hit on two objects: precision 1 up to recall 1/2 (51 of 101 points), then 2/3 (the other 50).
    file = new_annotations(tmp_path / "truth.json", [(1, 17, A), (1, 17, B)], images=2)
    results = [result(1, 17, A, 0.9), result(1, 17, C, 0.8), result(1, 17, B, 0.7)]
    found = evaluate(results, file, evaluator)
    expected = (51 * 1 + 50 * 2 / 3) / 101
    assert found.ap == pytest.approx(expected, abs=1e-9)
    assert found.ap50 == pytest.approx(expected, abs=1e-9)
    assert found.ap_small == pytest.approx(expected, abs=1e-9)
    assert (found.ap_medium, found.ap_large) == (None, None)
    assert found.ar1 == pytest.approx(0.5)
    assert found.ar100 == pytest.approx(1.0)
    assert found.per_class == {"cat": pytest.approx(expected, abs=1e-9), "dog": None}
    assert (found.images, found.evaluator) == (2, evaluator)
    json.dumps(found.to_dict(), allow_nan=False)


def test_looser_boxes_count_at_looser_thresholds(tmp_path, new_annotations):
    # IoU 8/10: a hit at .50, .55, ..., .75, not quite surely at .80, a miss above.
    file = new_annotations(tmp_path / "truth.json", [(1, 17, A)], images=1)
    found = evaluate([result(1, 17, [0, 0, 10, 7.8], 0.9)], file)
    assert found.ap == pytest.approx(0.6)
    assert (found.ap50, found.ap75) == (pytest.approx(1), pytest.approx(1))


def test_both_evaluators_agree(random_case):
    results, file = random_case
    found = crosscheck(results, file)
    reference = evaluate(results, file, "pycocotools")
    assert 0.05 < found.ap < 0.95
    for name in STATISTICS:
        assert getattr(found, name) == pytest.approx(getattr(reference, name), abs=1e-12)
    assert found.per_class == pytest.approx(reference.per_class, abs=1e-12)


def test_a_disagreement_is_an_error(random_case, monkeypatch):
    from dataclasses import replace

    results, file = random_case
    honest = accuracy.evaluate

    def wrong(results, annotations, evaluator):
        found = honest(results, annotations, evaluator)
        return replace(found, ap75=found.ap75 + 2e-6) if evaluator == "hotcoco" else found

    monkeypatch.setattr(accuracy, "evaluate", wrong)
    with pytest.raises(DeployError, match="disagree: ap75"):
        crosscheck(results, file)


def test_nothing_found_is_zero(random_case):
    _, file = random_case
    assert crosscheck([], file).ap == 0


def test_the_results_are_not_written_into(random_case):
    results, file = random_case
    before = json.dumps(results)
    crosscheck(results, file)
    assert json.dumps(results) == before


def test_strangers_and_damaged_annotations_are_refused(tmp_path, new_annotations):
    file = new_annotations(tmp_path / "truth.json", [(1, 17, A)], images=1)
    with pytest.raises(DeployError, match=r"images it does not list, such as \[7\]"):
        evaluate([result(7, 17, A, 0.9)], file)
    with pytest.raises(DeployError, match="unknown evaluator 'coco'"):
        evaluate([], file, "coco")
    file.write_text("{}")
    with pytest.raises(DeployError, match="images, annotations, categories lack"):
        evaluate([], file)
    new_annotations(file, [], images=1, categories=[{"id": 1, "name": "x"}, {"id": 2, "name": "x"}])
    with pytest.raises(DeployError, match="two categories have one name"):
        evaluate([], file)


@pytest.mark.parametrize("evaluator", ["hotcoco", "pycocotools"])
def test_an_evaluator_that_is_not_installed_is_a_users_error(random_case, monkeypatch, evaluator):
    results, file = random_case
    for name in list(sys.modules):
        if name.partition(".")[0] == evaluator:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, evaluator, None)
    with pytest.raises(DeployError, match=f"{evaluator} is not installed; pip install {evaluator}"):
        evaluate(results, file, evaluator)


def test_results_as_coco_writes_them(detections):
    rows = coco_results(5, detections(([1, 2, 11, 32], 0.5, 1), ([0, 0, 1, 1], 0.25, 0)), (17, 18))
    assert rows == [result(5, 18, [1, 2, 10, 30], 0.5), result(5, 17, [0, 0, 1, 1], 0.25)]


def test_a_predictor_is_evaluated_below_its_deployment_threshold(
    tmp_path, new_model, new_contract, new_image, new_annotations
):
    # The tiny model finds a cat (.9) and two dogs (.7, .6); the deployment threshold hides the last.
    truth = [
        (i, category, box) for i in (1, 2, 3) for category, box in [(17, [10, 10, 20, 20]), (18, [40, 40, 20, 24])]
    ]
    file = new_annotations(tmp_path / "truth.json", truth, images=3)
    for i in (1, 2, 3):
        new_image(tmp_path / "images" / f"{i}.png")
    seen = []
    for batch_size in (1, 2):
        model = new_model(tmp_path / "model.onnx", new_contract(score_threshold=0.65, evaluation_score_threshold=0.1))
        with Predictor.open(model) as predictor:
            found, results = evaluate_predictor(
                predictor, tmp_path / "images", file, batch_size=batch_size, progress=lambda *done: seen.append(done)
            )
        # Each dog is found as the second of two: precision 1/2 everywhere.
        assert found.per_class == {"cat": pytest.approx(1), "dog": pytest.approx(0.5)}
        assert len(results) == 9
    assert seen == [(1, 3), (2, 3), (3, 3)] * 2


def test_missing_images_and_foreign_classes_are_told_at_once(tmp_path, model, new_annotations):
    file = new_annotations(tmp_path / "truth.json", [(1, 17, A)], images=2, categories=[{"id": 17, "name": "cat"}])
    with Predictor.open(model) as predictor, pytest.raises(DeployError) as caught:
        evaluate_predictor(predictor, tmp_path, file)
    with pytest.raises(DeployError, match="unknown evaluator"):
        evaluate_predictor(None, tmp_path, file, "coco")  # before anything is predicted
    assert "category ids [18]" in str(caught.value)
    assert "2 of 2 images are missing" in str(caught.value)


def test_equal_ids_of_other_classes_are_not_scored(tmp_path, model, new_annotations):
    """As in a file from which classes were selected: its ids mean something else."""
    categories = [{"id": 17, "name": "horse"}, {"id": 18, "name": "dog"}]
    file = new_annotations(tmp_path / "truth.json", [(1, 17, A)], images=1, categories=categories)
    with (
        Predictor.open(model) as predictor,
        pytest.raises(DeployError, match="category 17 is 'horse', to the model 'cat'"),
    ):
        evaluate_predictor(predictor, tmp_path, file)
