"""A YOLO as student and as teacher: distilled by PKD and HEAD, pruned, exported with parity, bundled under its licence."""

import json
from importlib.util import find_spec

import onnx
import pytest
import torch

from pipeline import graph
from pipeline.errors import ConfigError, UserError
from stages import distill, export, prune, quantize, release, train, validate
from stages.detection.load import build_detector, save_weights

if find_spec("ultralytics") is None:
    pytest.skip("pip install 'headstart[ultralytics]' (AGPL-3.0)", allow_module_level=True)

SHORT = {
    "steps": 2,
    "batch_size": 4,
    "optimizer": {"name": "adamw", "lr": 1e-3, "warmup": 0, "schedule": "constant", "clip": 10},
    "device": "cpu",
}
METHODS = {
    "pkd": {"name": "pkd", "levels": 3, "weight": 2},
    "head": {"name": "head", "rois": 8, "proposals": 16, "warmup": 0, "normalise": True},
}
YOLO = {"name": "yolo", "model": "yolo26n"}


def lively(name, file, classes):
    """Weights with which a network detects something before it has learnt anything: its normalisations know a batch of
    noise, and its scores begin at a tenth, where Ultralytics begins at a thousandth."""
    torch.manual_seed(0)
    detector = build_detector({"name": "yolo", "model": name}, len(classes)).train()
    norms = [module for module in detector.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        detector.predict(detector.features(torch.randint(0, 256, (4, 3, 128, 128), dtype=torch.uint8)))
        for key, value in detector.head.named_parameters():
            if "cv3" in key and key.endswith("2.bias"):
                value.fill_(-2.2)
    save_weights(detector, file, classes)
    return str(file)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, make, digits, teacher_settings):
    folder = tmp_path_factory.mktemp("teacher")
    return make(folder, "teacher", train, {"detector": teacher_settings, **SHORT}, data=digits)


@pytest.fixture(scope="module")
def chain(tmp_path_factory, make, digits, teacher):
    folder = tmp_path_factory.mktemp("chain")
    config = {"student": YOLO, "methods": METHODS, "probes": 2, "teacher_sample": 4, **SHORT}
    config["weights"] = lively("yolo26n", folder / "begin.safetensors", digits.classes)
    distilled = make(folder, "distilled", distill, config, data=digits, teacher=[teacher])
    student = make(folder, "student", prune, {}, checkpoint=distilled, data=digits)
    model = make(folder, "onnx", export, {"parity_images": 6}, checkpoint=student, data=digits)
    accuracy = make(folder, "accuracy", validate, {}, data=digits, checkpoints=[student], models=[model])
    return distilled, student, model, accuracy


def test_a_yolo_is_distilled_pruned_and_exported_with_parity(chain):
    distilled, student, model, _ = chain
    losses = set(json.loads((distilled.path(distilled.metrics)).read_text().splitlines()[-1]))
    assert {"pkd/feature", "head/assist_cls", "head/akd", "head/ckd", "student/one_to_one_box"} <= losses
    assert student.proof.removed_tensors > 0
    assert model.parity.passed
    assert model.contract["nms"] == "none"
    names = {tensor.name for tensor in onnx.load(model.path(model.file)).graph.initializer}
    assert any("one2one_cv3" in name for name in names)
    assert not any(".head.cv3" in name for name in names)  # the head that only teaches does not ship


def test_the_file_has_the_ap_of_the_checkpoint(chain):
    rows = chain[-1].rows
    assert rows[0].statistics["ap"] == pytest.approx(rows[1].statistics["ap"], abs=1e-3)


def test_the_licence_travels_to_the_bundle(tmp_path, make, digits, chain):
    distilled, student, model, accuracy = chain
    assert distilled.licences == student.licences == model.licences == ("AGPL-3.0",)
    assert model.contract["producer"]["licences"] == ["AGPL-3.0"]
    slots = {"data": digits, "models": [model], "accuracy": [accuracy], "latency": [], "reports": []}
    made = make(tmp_path, "bundle", release, {}, **slots)
    folder = made.path(made.folder)
    assert json.loads((folder / "release.json").read_text())["licence"] == "agpl-3.0"
    written = (folder / "README.md").read_text()
    assert "license: agpl-3.0" in written
    assert "## Licence\n\nA detector that these weights were trained as, or taught by, comes under AGPL-3.0." in written
    with pytest.raises(UserError, match="release: licence: MIT is asked for"):
        make(tmp_path, "refused", release, {"licence": "MIT"}, **slots)


def test_a_yolo_that_needs_nms_is_quantised(tmp_path, make, digits):
    weights = lively("yolov8n", tmp_path / "begin.safetensors", digits.classes)
    config = {"detector": {"name": "yolo", "model": "yolov8n"}, "weights": weights, **SHORT}
    student = make(tmp_path, "student", train, config, data=digits)
    model = make(tmp_path, "onnx", export, {"parity_images": 4}, checkpoint=student, data=digits)
    assert model.contract["nms"] == "host"
    config = {"images": 8, "held_out": 8, "sensitivity_images": 1, "max_ap_drop": 1.0}
    rounded = make(tmp_path, "int8", quantize, config, model=model, data=digits)
    assert rounded.precision == "int8"
    assert rounded.bytes < 0.5 * model.bytes
    assert rounded.licences == ("AGPL-3.0",)


def test_a_yolo_teaches_what_a_pyramid_can_learn(tmp_path, make, digits, student_settings):
    guide = make(tmp_path, "guide", train, {"detector": {"name": "yolo", "model": "yolov8n"}, **SHORT}, data=digits)
    methods = {
        "pkd": {"name": "pkd", "levels": 3, "pairing": "stride"},
        "fitnet": {"name": "fitnet"},
        "cwd": {"name": "cwd", "weight": 1.0},
        "hands_on": {"name": "hands_on"},
    }
    config = {"student": student_settings, "methods": methods, "probes": 2, "teacher_sample": 4, **SHORT}
    distilled = make(tmp_path, "distilled", distill, config, data=digits, teacher=[guide])
    losses = json.loads((distilled.path(distilled.metrics)).read_text().splitlines()[-1])
    assert {name.partition("/")[0] for name in losses} >= {"student", *methods}
    assert distilled.licences == ("AGPL-3.0",)  # it was taught by one


PLAN = """
stages:
  data: {{uses: dataset, source: {{name: digits, train: 8, val: 4}}, size: 128}}
  teacher: {{uses: train, detector: {{name: yolo, model: yolov8n}}, steps: 1}}
  distilled: {{uses: distill, student: {{name: {student}}}, methods: {{m: {{name: {method}}}}}, steps: 1}}
  student: {{uses: prune, needs: {{checkpoint: distilled}}}}
  onnx: {{uses: export, needs: {{checkpoint: student}}}}
  accuracy: {{uses: validate}}
  bundle: {{uses: release{licence}}}
"""


@pytest.mark.parametrize(
    ("student", "method", "licence", "words"),
    [
        ("retinanet", "pkd", ", licence: MIT", "MIT is asked for, and a detector of the chain comes under AGPL-3.0"),
        ("retinanet", "head", "", "needs a two-stage teacher, was given YOLO"),
        ("yolo", "crosskd", "", "a tower that all levels of a dense student share"),
    ],
)
def test_what_cannot_be_is_said_when_it_is_planned(tmp_path, student, method, licence, words):
    file = tmp_path / "plan.yaml"
    file.write_text(PLAN.format(student=student, method=method, licence=licence))
    with pytest.raises(ConfigError, match=words):
        graph.load(file, (), "stages")
