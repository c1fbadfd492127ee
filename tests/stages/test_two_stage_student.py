"""A two-stage student: taught, pruned with proof and measured as any; only its export is refused, at plan time."""

import pytest
from safetensors.torch import load_file

from pipeline import graph
from pipeline.errors import ConfigError
from stages import distill, prune, train, validate
from stages.detection.detectors.faster_rcnn import FasterRCNN
from stages.detection.load import load_detector

TRAINING = {"steps": 3, "batch_size": 4, "device": "cpu", "optimizer": {"name": "adamw", "lr": 1e-3, "warmup": 1}}
CONFIG = """
stages:
  data: {uses: dataset, source: {name: digits, train: 8, val: 4}, size: 64}
  teacher: {uses: train, detector: cascade_rcnn, steps: 1}
  taught:
    uses: distill
    needs: {teacher: teacher}
    student: STUDENT
    methods: {pkd: pkd}
    steps: 1
  student: {uses: prune, needs: {checkpoint: taught}}
  onnx: {uses: export, needs: {checkpoint: student}}
"""


def test_a_cascade_teaches_a_faster_rcnn(make, tmp_path, digits, cascade_settings, teacher_settings):
    teacher = make(tmp_path, "teacher", train, {"detector": cascade_settings, **TRAINING}, data=digits)
    settings = {**teacher_settings, "neck_channels": 24}  # another width, so that there is an adapter to drop
    head = {"name": "head", "assistant": "cascade", "akd": 1, "ckd": 0, "rois": 8, "proposals": 16}
    config = {"student": settings, "methods": {"pkd": {"name": "pkd"}, "head": head}, "probes": 3, **TRAINING}
    taught = make(tmp_path, "taught", distill, config, data=digits, teacher=[teacher])
    student = make(tmp_path, "student", prune, {}, checkpoint=taught, data=digits)
    assert set(student.proof.removed) == {"pkd.adapters", "head.assistant", "head.akd_adapters"}
    assert student.proof.probes == 3
    assert not any("methods" in key for key in load_file(student.path(student.weights)))
    assert isinstance(load_detector(student.detector, 10, student.path(student.weights)), FasterRCNN)
    accuracy = make(tmp_path, "accuracy", validate, {}, data=digits, checkpoints=[teacher, taught, student], models=[])
    rows = {row.name: row for row in accuracy.rows}
    assert rows["taught"].statistics == rows["student"].statistics


@pytest.mark.parametrize("detector", ["faster_rcnn", "cascade_rcnn"])
def test_export_of_a_two_stage_student_is_refused_at_plan_time(detector):
    with pytest.raises(ConfigError, match=f"stages.onnx: {detector} of stage student cannot be exported"):
        graph.load(CONFIG.replace("STUDENT", detector))


@pytest.mark.parametrize("detector", ["retinanet", "fcos"])
def test_export_of_a_dense_student_is_planned(detector):
    assert "onnx" in graph.load(CONFIG.replace("STUDENT", detector)).by_name
