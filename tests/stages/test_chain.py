"""The work, stage by stage on tiny models: train, distil, prune with proof, export with parity, validate, release."""

import hashlib
import json
import shutil
import subprocess

import numpy as np
import onnx as graph
import pytest
import torch
from onnxruntime import InferenceSession
from safetensors.torch import load_file, save_file

from deploy import work
from deploy.bundle import Bundle
from deploy.deepstream import write as write_deepstream
from deploy.errors import DeployError
from deploy.predictor import Predictor
from deploy.sidecar import Sidecar
from deploy.verification import verify
from pipeline import ssh
from pipeline.errors import UserError, VerdictError, Waiting
from stages import benchmark, distill, export, prune, release, train, validate
from stages.artifacts.reports import LatencyReport, LatencyRow
from stages.exporting import onnx_file

TRAINING = {"steps": 3, "batch_size": 4, "device": "cpu", "optimizer": {"name": "adamw", "lr": 1e-3, "warmup": 1}}
METHODS = {
    "pkd": {"name": "pkd", "weight": 4},
    "head": {"name": "head", "rois": 8, "proposals": 16, "warmup": 2, "lr_scale": 0.1},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("chain")


@pytest.fixture(scope="module")
def teacher(make, folder, digits, teacher_settings):
    return make(folder, "teacher", train, {"detector": teacher_settings, **TRAINING}, data=digits)


@pytest.fixture(scope="module")
def distilled(make, folder, digits, teacher, student_settings):
    config = {"student": student_settings, "methods": METHODS, "probes": 3, "images": 20, **TRAINING}
    return make(folder, "distilled", distill, config, data=digits, teacher=[teacher])


@pytest.fixture(scope="module")
def student(make, folder, digits, distilled):
    return make(folder, "student", prune, {}, checkpoint=distilled, data=digits)


@pytest.fixture(scope="module")
def onnx(make, folder, digits, student):
    config = {"score_threshold": 0.001, "parity_images": 6}
    return make(folder, "onnx", export, config, checkpoint=student, data=digits)


def test_student_and_control_begin_with_the_same_weights(make, tmp_path, digits, student_settings, teacher):
    """A gain must not come from another start: with the learning rate at zero both end where they began."""
    still = {**TRAINING, "steps": 1, "optimizer": {"name": "sgd", "lr": 1e-30, "weight_decay": 0}}
    control = make(tmp_path, "control", train, {"detector": student_settings, **still}, data=digits)
    config = {"student": student_settings, "methods": METHODS, **still}
    helped = make(tmp_path, "helped", distill, config, data=digits, teacher=[teacher])
    alone, both = load_file(control.path(control.weights)), load_file(helped.path(helped.weights))
    for key, value in alone.items():
        torch.testing.assert_close(both[f"student.{key}"], value)


def test_distilled_checkpoint_holds_student_and_methods_but_no_teacher(distilled):
    keys = load_file(distilled.path(distilled.weights)).keys()
    assert {key.split(".")[0] for key in keys} == {"student", "methods"}
    assert any(key.startswith("methods.head.assistant.") for key in keys)
    assert distilled.images == 20
    assert distilled.teachers[0].key == "teacher-key"
    assert distilled.methods_flops > 0


def test_all_losses_are_logged(distilled):
    rows = [json.loads(line) for line in distilled.path("metrics.jsonl").read_text().splitlines()]
    names = {"student/cls", "student/box", "pkd/feature", "head/assist_cls", "head/assist_box", "head/akd", "head/ckd"}
    assert names <= rows[-1].keys()


def test_prune_proves_that_the_student_is_alone(student, distilled):
    proof = student.proof
    assert proof.probes == 3
    assert proof.parameters == distilled.parameters
    assert set(proof.removed) == {"head.assistant", "head.akd_adapters", "head.ckd_adapter"}
    assert proof.removed_parameters == sum(proof.removed.values())
    assert proof.removed_flops > 0
    assert not any("methods" in key or "assistant" in key for key in load_file(student.path(student.weights)))


def test_no_teacher_is_needed(make, tmp_path, digits, student_settings):
    """TF-HEAD: distilled, pruned with proof and measured, and no teacher anywhere."""
    rcnn = {"assistant": {"name": "rcnn", "head": {"hidden": 16, "sampling_ratio": 1}}, "ckd": 1.3}
    fcos = {"assistant": {"name": "fcos", "weight": 0.5, "head": {"convs": 1, "reach": 2}}}
    assistants = {"rcnn": rcnn, "fcos": fcos}
    methods = {"tf": {"name": "tf_head", "rois": 8, "proposals": 16, "warmup": 1, "assistants": assistants}}
    config = {"student": student_settings, "methods": methods, "probes": 2, "images": 20, **TRAINING}
    distilled = make(tmp_path, "distilled", distill, config, data=digits)
    assert distilled.teachers == ()
    assert distilled.methods_flops > 0
    rows = [json.loads(line) for line in distilled.path("metrics.jsonl").read_text().splitlines()]
    assert {"student/cls", "tf/rcnn_cls", "tf/rcnn_box", "tf/rcnn_ckd", "tf/fcos_box", "tf/fcos_ckd"} <= rows[-1].keys()
    student = make(tmp_path, "student", prune, {}, checkpoint=distilled, data=digits)
    assert set(student.proof.removed) == {"tf.assistants", "tf.ckd_adapters"}
    accuracy = make(tmp_path, "accuracy", validate, {}, data=digits, checkpoints=[distilled, student], models=[])
    before, after = accuracy.rows
    assert before.statistics == after.statistics


@pytest.fixture
def tampered(tmp_path, distilled):
    """A copy of the distilled checkpoint whose tensors a test has changed."""

    def change(function):
        copy = tmp_path / "tampered"
        shutil.copytree(distilled.directory, copy)
        state = load_file(copy / distilled.weights)
        function(state)
        save_file(state, copy / distilled.weights)
        return distilled.placed(copy, name="distilled", key="tampered")

    return change


def test_a_planted_assistant_fails_the_prune(make, tmp_path, digits, tampered):
    def plant(state):
        state["student.assistant.weight"] = torch.ones(3)

    with pytest.raises(VerdictError, match=r"assistant\.weight is no tensor of the student"):
        make(tmp_path, "student", prune, {}, checkpoint=tampered(plant), data=digits)


def test_a_tensor_of_nobody_fails_the_prune(make, tmp_path, digits, tampered):
    def plant(state):
        state["teacher.weight"] = torch.ones(3)

    with pytest.raises(VerdictError, match=r"teacher\.weight belongs neither to the student nor to a method"):
        make(tmp_path, "student", prune, {}, checkpoint=tampered(plant), data=digits)


def test_changed_weights_do_not_reproduce_the_probes(make, tmp_path, digits, tampered):
    def nudge(state):
        state["student.head.classification_head.cls_logits.bias"] += 1e-3

    with pytest.raises(VerdictError, match="scores differ from those before pruning"):
        make(tmp_path, "student", prune, {}, checkpoint=tampered(nudge), data=digits)


def test_export_agrees_with_pytorch_on_images(onnx):
    assert onnx.parity.passed
    assert onnx.parity.matched > 0
    assert onnx.opset == onnx_file.OPSET
    assert onnx.initialisers > 10


def test_exported_file_takes_any_batch(onnx, digits):
    images = sorted(digits.folder("val").glob("*.jpg"))[:5]
    with Predictor.open(onnx.path(onnx.file)) as predictor:
        one_by_one = [predictor([image])[0] for image in images]
        together = predictor(images)
    for alone, batched in zip(one_by_one, together, strict=True):
        assert alone.labels.tolist() == batched.labels.tolist()
        assert alone.boxes_xyxy == pytest.approx(batched.boxes_xyxy, abs=1e-3)


def test_a_planted_weight_fails_the_export(make, tmp_path, digits, student, monkeypatch):
    """An exporter that carries a tensor which is not the student's: here an addend in the graph."""

    class Leaking(onnx_file.Graph):
        def __init__(self, detector, count):
            super().__init__(detector, count)
            self.assistant = torch.nn.Parameter(torch.linspace(0, 1e-6, 1000))

        def forward(self, images_BHWC):
            boxes, scores, labels = super().forward(images_BHWC)
            return boxes, scores + self.assistant, labels

    monkeypatch.setattr(onnx_file, "Graph", Leaking)
    with pytest.raises(VerdictError, match=r"1 initialisers of the ONNX file are not the student's: .*assistant"):
        make(tmp_path, "onnx", export, {}, checkpoint=student, data=digits)


def test_export_fails_where_file_and_pytorch_disagree(make, tmp_path, digits, student):
    with pytest.raises(VerdictError, match="does not detect what PyTorch detects"):
        make(tmp_path, "onnx", export, {"parity_box_px": 1e-12, "parity_score": 1e-12}, checkpoint=student, data=digits)


def test_a_two_stage_teacher_is_refused_by_export(make, tmp_path, digits, teacher):
    with pytest.raises(UserError, match="faster_rcnn has no static graph"):
        make(tmp_path, "onnx", export, {}, checkpoint=teacher, data=digits)


@pytest.fixture(scope="module")
def with_nms(make, folder, digits, student):
    config = {"score_threshold": 0.001, "parity_images": 6, "nms": "graph"}
    return make(folder, "with_nms", export, config, checkpoint=student, data=digits)


def test_nms_inside_the_file_is_its_own_row_of_the_same_ap(make, tmp_path, digits, student, onnx, with_nms):
    assert with_nms.contract["nms"] == "graph"
    assert (with_nms.candidates, with_nms.contract["candidates"]) == (1000, 100)
    assert "NMS in the graph keeps what the host's keeps: " in with_nms.parity.sentence
    assert sorted(file.name for file in with_nms.directory.iterdir()) == ["model.onnx"]
    # The file with NMS inside comes first: what PyTorch is measured with must not change with it.
    slots = {"data": digits, "checkpoints": [student], "models": [with_nms, onnx]}
    torch_row, graph, host = make(tmp_path, "accuracy", validate, {}, **slots).rows
    assert torch_row.statistics["ap"] == pytest.approx(host.statistics["ap"], abs=1e-3)
    assert graph.statistics["ap"] == pytest.approx(host.statistics["ap"], abs=1e-3)
    assert graph.sha256 != host.sha256


def test_a_row_of_latency_for_every_batch_and_number_of_threads(make, tmp_path, digits, onnx):
    config = {"iterations": 20, "images": 4, "batch": [1, 2], "threads": 1, "rate": 50}
    report = make(tmp_path, "latency", benchmark, config, data=digits, models=[onnx])
    assert [(row.batch, row.threads) for row in report.rows] == [(1, 1), (2, 1)]
    for row in report.rows:
        assert row.sha256 == onnx.sha256
        assert row.images_per_second == pytest.approx(1e3 * row.batch / row.steps["end_to_end"]["mean"])
        assert row.at_rate["response"]["n"] == 20
        assert row.evidence["samples"] >= 2
        assert len(json.loads(report.path(row.calls).read_text())["end_to_end_ms"]) == 20


@pytest.mark.parametrize("settings", [{"batch": []}, {"batch": [1, 0]}, {"threads": 0}])
def test_a_sweep_of_nothing_is_refused_at_plan_time(settings):
    (problem,) = benchmark.check(benchmark.Config(**settings), {})
    assert "whole numbers of at least 1 are wanted" in problem
    assert list(benchmark.check(benchmark.Config(batch=[1, 8], threads=[1, 2]), {})) == []


@pytest.fixture(scope="module")
def accuracy(make, folder, digits, teacher, distilled, student, onnx):
    return make(folder, "accuracy", validate, {}, data=digits, checkpoints=[teacher, distilled, student], models=[onnx])


def test_every_model_is_measured_and_the_rows_form_a_chain(accuracy):
    rows = {row.name: row for row in accuracy.rows}
    assert [row.kind for row in accuracy.rows] == ["trained", "distilled", "pruned", "exported"]
    assert rows["onnx"].source == rows["student"].key
    assert rows["student"].source == rows["distilled"].key
    assert rows["distilled"].source == rows["teacher"].key
    assert rows["onnx"].crosschecked
    assert rows["distilled"].statistics == rows["student"].statistics
    assert rows["student"].statistics["ap"] == pytest.approx(rows["onnx"].statistics["ap"], abs=1e-3)
    assert set(rows["onnx"].per_class) == {str(digit) for digit in range(10)}


def test_release_carries_what_was_measured_and_verifies(make, tmp_path, digits, onnx, accuracy):
    slots = {"data": digits, "models": [onnx], "accuracy": [accuracy], "latency": [], "reports": []}
    made = make(tmp_path, "bundle", release, {"sample": True, "licence": "cc-by-2.0"}, **slots)
    folder = made.path(made.folder)
    manifest = json.loads((folder / "release.json").read_text())
    (model,) = manifest["models"]
    assert model["accuracy"]["statistics"]["ap"] == accuracy.rows[-1].statistics["ap"]
    assert (model["backend"], model["precision"], model["made_for"], model["latency"]) == (
        "onnxruntime",
        "fp32",
        {},
        [],
    )
    assert manifest["provenance"]["dataset_fingerprint"] == digits.fingerprint
    assert manifest["files"]["model.onnx"]["sha256"] == model["sha256"] == onnx.sha256
    assert [check.passed for check in verify(folder)] == [True, True, True]
    assert "## Measured on this very file" in (folder / "README.md").read_text()
    # A real graph, for DeepStream: with float planes in, the outputs are the golden ones.
    config = write_deepstream(opened := Bundle.open(folder), opened.models[0], tmp_path / "deepstream")
    golden = {name: np.load(folder / file) for name, file in manifest["sample"]["tensors"].items()}
    planes_BCHW = golden.pop("images").transpose(0, 3, 1, 2).astype(np.float32)
    session = InferenceSession(str(config.parent / "model_planes.onnx"), providers=["CPUExecutionProvider"])
    for name, found in zip(golden, session.run(list(golden), {"images": planes_BCHW}), strict=True):
        np.testing.assert_allclose(found, golden[name], rtol=1e-5, atol=1e-4)


def timed(model, milliseconds):
    """A latency report of a model that nobody ran."""
    row = LatencyRow(
        name=model.name,
        kind="exported",
        key=model.key,
        source=model.source,
        backend="onnxruntime",
        sha256=model.sha256,
        parameters=1,
        bytes=1,
        machine={"cpu": "another"},
        steps={"end_to_end": {"p50": milliseconds, "p99": None, "mean": milliseconds}},
        threads=1,
        flops=1,
        peak_memory_mb=None,
        reliable=True,
        evidence={},
    )
    return LatencyReport(rows=(row,))


@pytest.fixture
def second(tmp_path, onnx):
    """The same model as another file, as a second export would be; an engine's sidecar lies beside it."""
    directory = tmp_path / "second"
    directory.mkdir()
    written = graph.load(onnx.path(onnx.file))
    written.doc_string = "another file"
    graph.save(written, directory / onnx.file)
    return lambda made_for=None, **changes: placed(onnx, directory, made_for, changes)


def placed(onnx, directory, made_for, changes):
    file = directory / onnx.file
    if made_for is not None:
        contract = json.dumps(onnx.contract)
        Sidecar(changes["backend"], "0" * 64, 1, onnx.file, "0" * 64, made_for, {}, {}, contract).write(file)
        changes = {"made_for": made_for, **changes}
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    return onnx.model_copy(update={"sha256": sha256, **changes}).placed(directory, name="other[seed=0]", key="other")


def test_release_holds_several_files_and_the_fastest_is_taken(make, tmp_path, digits, onnx, accuracy, second):
    other = second(precision="fp16")
    measured = accuracy.rows[-1].model_copy(update={"sha256": other.sha256})
    both = accuracy.model_copy(update={"rows": (*accuracy.rows, measured)})
    slots = {"data": digits, "models": [other, onnx], "accuracy": [both], "reports": []}
    slots["latency"] = [timed(onnx, 20.0), timed(other, 10.0)]
    made = make(tmp_path, "bundle", release, {"sample": True, "rebuild": "pipeline run x.yaml"}, **slots)
    opened = Bundle.open(made.path(made.folder))
    assert [model.file for model in opened.models] == [
        "onnx.onnx",
        "other_seed_0.onnx",
    ]  # the fp32 one is the reference
    assert {model.rebuild for model in opened.models} == {"pipeline run x.yaml"}
    assert opened.release["provenance"]["model_keys"] == {"onnx": "onnx-key", "other[seed=0]": "other"}
    with Predictor.open(opened.path) as predictor:
        assert predictor.model.file == "other_seed_0.onnx"
    assert [check.passed for check in verify(opened.path)] == [True, True, True]
    card = (opened.path / "README.md").read_text()
    assert "## Measured on onnx.onnx" in card
    assert "p50 10.00, p99 not measured, on another" in card


def test_release_takes_what_an_engine_says_of_itself(make, tmp_path, digits, onnx, accuracy, second):
    """A file that cannot run here is bundled with what it was made for; the sample does without it."""
    engine = second({"compute_capabilities": ["99.0"]}, backend="tensorrt_of_tomorrow")
    measured = accuracy.rows[-1].model_copy(update={"sha256": engine.sha256})
    both = accuracy.model_copy(update={"rows": (*accuracy.rows, measured)})
    slots = {
        "data": digits,
        "models": [engine, onnx],
        "accuracy": [both],
        "latency": [timed(engine, 1.0)],
        "reports": [],
    }
    opened = Bundle.open((made := make(tmp_path, "bundle", release, {"sample": True}, **slots)).path(made.folder))
    assert opened.models[1].made_for == {"compute_capabilities": ["99.0"]}
    assert opened.models[1].rebuild == "deploy build model.onnx ENGINE --backend tensorrt_of_tomorrow"
    assert "other_seed_0.onnx.json" in opened.release["files"]
    assert list(opened.release["sample"]["detections"]) == ["onnx.onnx"]
    with Predictor.open(opened.path) as predictor:
        assert predictor.model.file == "onnx.onnx"
    with pytest.raises(DeployError, match="there is no 'tensorrt_of_tomorrow'"):
        Predictor.open(opened.path, model="other_seed_0.onnx")


def test_release_refuses_a_file_nobody_measured(make, tmp_path, digits, onnx, accuracy):
    other = onnx.model_copy(update={"sha256": "0" * 64}).placed(onnx.directory, name="other", key="other")
    with pytest.raises(UserError, match="no AP was measured on other"):
        make(tmp_path, "bundle", release, {}, data=digits, models=[other], accuracy=[accuracy], latency=[], reports=[])


def test_a_teacher_of_other_classes_is_refused(make, tmp_path, digits, teacher, student_settings):
    other = teacher.model_copy(update={"classes": teacher.classes[::-1]}).placed(teacher.directory, name="other")
    config = {"student": student_settings, "methods": METHODS, **TRAINING}
    with pytest.raises(UserError, match="must have learnt the same classes in the same order"):
        make(tmp_path, "wrong", distill, config, data=digits, teacher=[other])


def test_a_pair_that_head_cannot_bridge_is_known_before_any_training(student_settings, teacher_settings):
    class Node:
        name = "teacher"
        config = train.Config(detector=student_settings, **TRAINING)

    config = distill.Config(student=teacher_settings, methods=METHODS, **TRAINING)
    (problem,) = distill.check(config, {"teacher": [Node]})
    assert (
        "methods.head: it pairs a dense student with a teacher of another kind, or two two-stage detectors, "
        "was given FasterRCNN and RetinaNet" in problem
    )


def test_two_teachers_teach_at_once_and_are_recorded(
    make, tmp_path, digits, teacher, teacher_settings, student_settings
):
    small = make(
        tmp_path, "small", train, {"detector": {**teacher_settings, "neck_channels": 24}, **TRAINING}, data=digits
    )
    methods = {"pkd": {"name": "pkd", "teacher": "small"}, "head": {**METHODS["head"], "teacher": "teacher"}}
    config = {"student": student_settings, "methods": methods, "probes": 2, "teacher_sample": 3, **TRAINING}
    made = make(tmp_path, "distilled", distill, config, data=digits, teacher=[teacher, small])
    assert [(one.name, one.key, one.images) for one in made.teachers] == [
        ("teacher", "teacher-key", 3),
        ("small", "small-key", 3),
    ]
    assert made.source == "teacher-key"
    assert {one.loss for one in made.gradients} >= {"student/cls", "pkd/feature", "head/akd"}
    assert sum(one.neck for one in made.gradients) == pytest.approx(1)
    state = load_file(made.path(made.weights))
    assert state["methods.pkd.adapters.0.weight"].shape[0] == 24  # it learnt from the small one


def test_a_teacher_below_the_floor_stops_the_stage(make, tmp_path, digits, teacher, student_settings):
    config = {"student": student_settings, "methods": METHODS, "min_teacher_ap": 0.9, **TRAINING}
    with pytest.raises(
        UserError, match=r"the teacher teacher has .* AP on a sample of 12 .* min_teacher_ap asks for 90"
    ):
        make(tmp_path, "stopped", distill, config, data=digits, teacher=[teacher])
    unmeasured = distill.Config(**{**config, "teacher_sample": 0, "methods": {"pkd": METHODS["pkd"]}})
    assert any("min_teacher_ap: asks for an AP that teacher_sample: 0" in one for one in distill.check(unmeasured, {}))


def test_weights_of_another_detector_are_refused(make, tmp_path, digits, teacher, student_settings):
    config = {"detector": student_settings, "weights": str(teacher.path(teacher.weights)), **TRAINING}
    with pytest.raises(UserError, match=r"not a checkpoint of RetinaNet"):
        make(tmp_path, "wrong", train, config, data=digits)


def test_a_pickle_is_refused(make, tmp_path, digits, student_settings):
    file = tmp_path / "model.pt"
    torch.save({"model": pytest.ExitCode.OK}, file)
    config = {"detector": student_settings, "weights": str(file), **TRAINING}
    with pytest.raises(UserError, match=r"a pickled model, whose opening calls .*ExitCode"):
        make(tmp_path, "wrong", train, config, data=digits)


def test_same_seed_same_weights(make, tmp_path, digits, distilled, teacher, student_settings):
    config = {"student": student_settings, "methods": METHODS, "probes": 3, "images": 20, **TRAINING}
    again = make(tmp_path, "again", distill, config, data=digits, teacher=[teacher])
    a, b = load_file(distilled.path(distilled.weights)), load_file(again.path(again.weights))
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def there(folder, digits, onnx, bare_python):
    """AP and latency of the file, measured by whoever carries folders, without any package of ours or torch."""
    config = {validate: validate.Config(), benchmark: benchmark.Config(iterations=20, images=3, threads=1)}
    folders = {}
    for stage, settings in config.items():
        folders[stage] = folder / f"work_{stage.__name__}"
        command = stage.work(settings, folders[stage], data=digits, models=[onnx])
        with pytest.raises(Waiting, match=r"1 of 1 tasks have no result yet \(onnx\)"):
            stage.take(settings, folder, folders[stage], "box", data=digits, models=[onnx])
        ran = subprocess.run([bare_python, *command], cwd=folders[stage], capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr
    return config, folders


def test_a_target_measures_the_ap_that_is_measured_here(tmp_path, digits, onnx, accuracy, there):
    config, folders = there
    made, device = validate.take(config[validate], tmp_path, folders[validate], "box", data=digits, models=[onnx])
    (row,), here = made.rows, accuracy.rows[-1]
    told = ("target", "machine")
    assert row.model_dump(exclude={*told, "runtime"}) == here.model_dump(exclude={*told, "runtime"})
    assert (row.target, row.label) == ("box", "onnx on box")
    assert row.machine["name"] == device["name"]
    assert json.loads((tmp_path / row.results).read_text()) == json.loads(accuracy.path(here.results).read_text())


def test_a_target_measures_latency(tmp_path, digits, onnx, there):
    config, folders = there
    made, _ = benchmark.take(config[benchmark], tmp_path, folders[benchmark], "box", data=digits, models=[onnx])
    (row,) = made.rows
    assert (row.target, row.threads, row.sha256) == ("box", 1, onnx.sha256)
    assert row.steps["end_to_end"]["n"] == 20
    assert {"gpus", "power_mode"} <= row.machine.keys()


def test_an_evaluator_there_that_found_another_ap_is_a_verdict(tmp_path, digits, onnx, there):
    config, folders = there
    copy = shutil.copytree(folders[validate], tmp_path / "copy")
    file = copy / "results/onnx/result.json"
    record = json.loads(file.read_text())
    record["value"]["accuracy"]["ap"] += 1e-3
    file.write_text(json.dumps(record))
    with pytest.raises(VerdictError, match="of the same detections; trust neither"):
        validate.take(config[validate], tmp_path, copy, "box", data=digits, models=[onnx])


def test_results_of_another_file_are_refused(tmp_path, digits, onnx, there):
    config, folders = there
    (tmp_path / "other").mkdir()
    file = shutil.copyfile(onnx.path(onnx.file), tmp_path / "other" / onnx.file)
    with file.open("ab") as opened:
        opened.write(b"\0")
    other = onnx.placed(tmp_path / "other", name="onnx", key="other")
    validate.work(config[validate], tmp_path / "work", data=digits, models=[other])
    shutil.copytree(folders[validate] / "results", tmp_path / "work/results")
    with pytest.raises(UserError, match=r"results/onnx: made from another inputs/models/onnx/model.onnx"):
        validate.take(config[validate], tmp_path, tmp_path / "work", "box", data=digits, models=[other])


def test_the_runtime_of_a_target_need_not_be_here(tmp_path, digits, onnx):
    """A config whose engine belongs to another machine trains and packs on one without its runtime."""
    engine = onnx.model_copy(update={"backend": "abacus"}).placed(onnx.directory, name="engine", key="engine")
    for stage in (validate, benchmark):
        folder = tmp_path / stage.__name__
        assert stage.work(stage.Config(), folder, data=digits, models=[engine]) == ["-m", "deploy", "work", "."]
        (task,) = json.loads((folder / "work.json").read_text())["tasks"]
        assert task["settings"]["backend"] == "abacus"


def test_a_target_with_no_model_to_measure_is_a_mistake(tmp_path, digits):
    with pytest.raises(UserError, match="no exported model is wired"):
        validate.work(validate.Config(), tmp_path / "work", data=digits, models=[])


def test_the_work_is_done_over_ssh(tmp_path, digits, onnx, bare_python, ssh_server):
    config = benchmark.Config(iterations=5, images=2, threads=1)
    folder = tmp_path / "latency"
    command = benchmark.work(config, folder, data=digits, models=[onnx])
    host = ssh.Host("box", "box", str(bare_python), ssh_server.config)
    ssh.do(host, str(tmp_path / "there"), folder, [str(bare_python), *command])
    assert (tmp_path / "there/latency/deploy/__main__.py").is_file()
    made, _ = benchmark.take(config, tmp_path, folder, "box", data=digits, models=[onnx])
    assert made.rows[0].steps["inference"]["n"] == 5
    assert work.results(folder)["onnx"].device["python"]
