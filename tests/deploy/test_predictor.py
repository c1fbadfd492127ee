import numpy as np
import onnx
import pytest
from PIL import Image

from deploy.errors import DeployError
from deploy.predictor import Predictor


def same(a, b):
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("boxes_xyxy", "scores", "labels"))


def test_detections_in_pixels_of_the_original(model):
    with Predictor.open(model) as predictor:
        (found,) = predictor([Image.new("RGB", (128, 128), "white")])
    np.testing.assert_allclose(found.boxes_xyxy, [[20, 20, 60, 60], [22, 22, 62, 62], [80, 80, 120, 128]])
    np.testing.assert_allclose(found.scores, [0.9, 0.7, 0.6], rtol=1e-6)
    assert found.labels.tolist() == [0, 1, 1]


def test_steps_are_the_call(model, white):
    with Predictor.open(model) as predictor:
        batch, placements = predictor.prepare([predictor.decode(white)])
        (stepwise,) = predictor.finish(predictor.infer(batch), placements, 0.65)
        (called,) = predictor([white], 0.65)
    assert same(stepwise, called)
    assert len(called) == 2


def test_batches_change_nothing(model, tmp_path, new_image):
    files = [new_image(tmp_path / f"{i}.png", (250 - 5 * i,) * 3, (64 + 7 * i, 64)) for i in range(5)]
    with Predictor.open(model) as predictor:
        one_by_one = [predictor([file], 0.1)[0] for file in files]
        batched = list(predictor.batch(files, 2, 0.1))
        assert predictor([]) == []
    assert len({float(found.scores[0]) for found in batched}) == 5  # the images are told apart
    assert all(same(a, b) for a, b in zip(one_by_one, batched, strict=True))


def test_a_file_without_contract_is_refused(model):
    file = onnx.load(model)
    del file.metadata_props[:]
    onnx.save(file, model)
    with pytest.raises(DeployError, match="no contract"):
        Predictor.open(model)


def test_batch_size_is_checked(model):
    with Predictor.open(model) as predictor, pytest.raises(ValueError, match="batch_size"):
        next(predictor.batch([], 0))
