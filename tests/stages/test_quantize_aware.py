"""Quantisation-aware distillation: a detector learns to bear rounding, and leaves the stage as a plain one."""

import json

import pytest
import torch
from safetensors.torch import load_file

from stages import export, prune, quantize_aware, train
from stages.detection.load import checksum, load_detector
from stages.training.fake_quantisation import fake_quantise

TRAINING = {"batch_size": 4, "device": "cpu", "optimizer": {"name": "adamw", "lr": 1e-3, "warmup": 1}}
METHODS = {"pkd": {"name": "pkd", "weight": 4}, "crosskd": {"name": "crosskd", "convs": 1}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("aware")


@pytest.fixture(scope="module")
def student(make, folder, digits, student_settings):
    return make(folder, "student", train, {"detector": student_settings, "steps": 20, **TRAINING}, data=digits)


@pytest.fixture(scope="module")
def aware(make, folder, digits, student):
    config = {"methods": METHODS, "steps": 4, "probes": 2, "teacher_sample": 3, "images": 20, **TRAINING}
    return make(folder, "aware", quantize_aware, config, checkpoint=student, data=digits)


def test_it_begins_where_the_student_is_and_learns(aware, student):
    before, after = load_file(student.path(student.weights)), load_file(aware.path(aware.weights))
    moved = {
        key: (after[f"student.{key}"] - value).abs().max().item() for key, value in before.items() if "conv" in key
    }
    assert all(0 < one < 0.1 for one in moved.values())
    running = [key for key in before if "running" in key]
    assert running
    assert all(torch.equal(after[f"student.{key}"], before[key]) for key in running)
    assert aware.source == student.key
    assert aware.teachers[0].key == student.key


def test_its_methods_taught_it(aware):
    rows = [json.loads(line) for line in aware.path(aware.metrics).read_text().splitlines()]
    assert {"student/cls", "student/box", "pkd/feature"} <= rows[-1].keys()
    assert any(name.startswith("crosskd/") for name in rows[-1])


def test_it_leaves_as_a_plain_detector(make, tmp_path, digits, aware, student):
    """Pruned with proof and exported like any other; nothing of the rounding is in the file."""
    keys = {key for key in load_file(aware.path(aware.weights)) if key.startswith("student.")}
    assert keys == {f"student.{key}" for key in load_file(student.path(student.weights))}
    pruned = make(tmp_path, "pruned", prune, {}, checkpoint=aware, data=digits)
    assert pruned.proof.probes == 2
    onnx = make(tmp_path, "onnx", export, {"parity_images": 2}, checkpoint=pruned, data=digits)
    assert onnx.parity.passed


def test_the_rounding_is_what_it_learns_under(digits, student):
    """A student that is rounded computes something else than itself, and near it."""
    detector = load_detector(student.detector, 10, student.path(student.weights))
    images = torch.randint(0, 256, (2, 3, 128, 128), dtype=torch.uint8)
    with torch.no_grad():
        whole = detector.predict(detector.features(images)).logits_BAK
        before = checksum(detector)
        fake_quantise(detector, digits.height, digits.width, "onnxruntime")
        detector.train()
        rounded = detector.predict(detector.features(images)).logits_BAK
    off = (rounded - whole).abs()
    assert 0 < off.mean() < 0.2 * whole.std()
    assert checksum(detector) != before  # only by the ranges, which are not kept


def test_weights_of_another_training_are_refused(tmp_path):
    (tmp_path / "w.safetensors").touch()
    config = quantize_aware.Config(methods=METHODS, steps=1, weights=str(tmp_path / "w.safetensors"), **TRAINING)
    assert any("begins with the weights of its checkpoint" in one for one in quantize_aware.check(config, {}))


def test_a_method_that_cannot_bridge_the_detector_to_itself_is_known_before(student_settings):
    class Node:
        name = "student"
        config = train.Config(detector=student_settings, steps=1, **TRAINING)

    config = quantize_aware.Config(methods={"head": {"name": "head"}}, steps=1, **TRAINING)
    (problem,) = quantize_aware.check(config, {"checkpoint": [Node]})
    assert "methods.head: it pairs a dense student with a teacher of another kind" in problem
    config = quantize_aware.Config(methods=METHODS, steps=1, **TRAINING)
    assert list(quantize_aware.check(config, {"checkpoint": [Node]})) == []
