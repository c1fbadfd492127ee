import json

import numpy as np
import pytest

from deploy import gain
from deploy.accuracy import evaluate
from deploy.errors import DeployError
from deploy.gain import paired_bootstrap


def noisy(truth, seed, noise):
    """Each object found twice, off by `noise` pixels, a tenth of them under the wrong class."""
    rng = np.random.default_rng(seed)
    return [
        {
            "image_id": image,
            "category_id": category if rng.uniform() < 0.9 else 35 - category,
            "bbox": (np.asarray(box) + rng.normal(0, noise, 4)).clip(1).tolist(),
            "score": float(rng.uniform()),
        }
        for image, category, box in truth * 2
    ]


@pytest.fixture
def case(tmp_path, new_annotations):
    rng = np.random.default_rng(0)
    truth = [
        (
            int(rng.integers(1, 39)),
            int(rng.choice([17, 18])),
            [*rng.uniform(0, 30, 2).tolist(), *rng.uniform(8, 30, 2).tolist()],
        )
        for _ in range(100)
    ]
    file = new_annotations(tmp_path / "truth.json", truth, images=40)
    dataset = json.loads(file.read_text())
    for annotation in dataset["annotations"][::10]:
        annotation["iscrowd"] = 1
    file.write_text(json.dumps(dataset))
    return truth, file


def copied(dataset, results, counts, file):
    """The dataset in which each image really stands as often as it was drawn."""
    images, annotations, copies = [], [], []
    for image, count in zip(dataset["images"], counts, strict=True):
        for _ in range(count):
            number = len(images) + 1
            images.append(image | {"id": number})
            own = [one for one in dataset["annotations"] if one["image_id"] == image["id"]]
            annotations += [one | {"id": len(annotations) + i, "image_id": number} for i, one in enumerate(own, 1)]
            copies += [one | {"image_id": number} for one in results if one["image_id"] == image["id"]]
    file.write_text(json.dumps(dataset | {"images": images, "annotations": annotations}))
    return copies


def test_weights_are_as_good_as_copies(case, tmp_path):
    truth, file = case
    results = noisy(truth, 1, 3.0)
    matches = gain._matches(results, file)
    weights = np.random.default_rng(5).multinomial(40, np.full(40, 1 / 40), 6)
    weights[0] = 1
    weights[1] = [1] + [0] * 39
    found = gain.average_precision(matches, weights)
    assert found[0] == pytest.approx(evaluate(results, file).ap, abs=1e-12)
    dataset = json.loads(file.read_text())
    for ap, counts in zip(found, weights, strict=True):
        results_of_copies = copied(dataset, results, counts, tmp_path / "copies.json")
        expected = evaluate(results_of_copies, tmp_path / "copies.json", "pycocotools").ap
        assert ap == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_chunks_change_nothing(case, monkeypatch):
    truth, file = case
    matches = gain._matches(noisy(truth, 1, 3.0), file)
    weights = np.random.default_rng(5).multinomial(40, np.full(40, 1 / 40), 50)
    whole = gain.average_precision(matches, weights)
    monkeypatch.setattr(gain, "_CHUNK_VALUES", 700)
    np.testing.assert_array_equal(gain.average_precision(matches, weights), whole)


def test_a_clear_gain_excludes_zero_and_reverses(case):
    truth, file = case
    worse, better = noisy(truth, 1, 4.0), noisy(truth, 2, 1.0)
    found = paired_bootstrap(worse, better, file, samples=300)
    assert found.ap_a == pytest.approx(evaluate(worse, file).ap, abs=1e-12)
    assert found.difference == pytest.approx(evaluate(better, file).ap - found.ap_a, abs=1e-12)
    assert 0 < found.low < found.difference < found.high
    assert found == paired_bootstrap(worse, better, file, samples=300)
    back = paired_bootstrap(better, worse, file, samples=300)
    assert (back.low, back.high) == (pytest.approx(-found.high), pytest.approx(-found.low))
    assert found.low != paired_bootstrap(worse, better, file, samples=300, seed=1).low


def test_pairs_share_their_images(case):
    # A model against itself differs by nothing in any draw; unpaired draws would spread.
    truth, file = case
    results = noisy(truth, 1, 3.0)
    found = paired_bootstrap(results, results, file, samples=50)
    assert (found.difference, found.low, found.high) == (0, 0, 0)


def test_the_interval_has_the_width_of_copies(case, tmp_path):
    truth, file = case
    a, b = noisy(truth, 1, 4.0), noisy(truth, 2, 3.0)
    dataset = json.loads(file.read_text())
    differences = []
    for counts in np.random.default_rng(9).multinomial(40, np.full(40, 1 / 40), 150):
        aps = []
        for results in (a, b):
            results_of_copies = copied(dataset, results, counts, tmp_path / "copies.json")
            aps.append(evaluate(results_of_copies, tmp_path / "copies.json").ap)
        differences.append(aps[1] - aps[0])
    found = paired_bootstrap(a, b, file)
    # 150 draws know their spread to 6 %; drawing each image at most once would give 0.77 of it.
    assert found.standard_error == pytest.approx(np.std(differences), rel=0.17)


def test_without_ground_truth_there_is_no_gain(tmp_path, new_annotations):
    file = new_annotations(tmp_path / "truth.json", [], images=2)
    with pytest.raises(DeployError, match="no ground truth"):
        paired_bootstrap([], [], file)
