"""Assistants beside the R-CNN one: the cascade looks where its own stages look, the points of FCOS are its own."""

import pytest
import torch

from pipeline.config import Choice
from pipeline.errors import UserError
from stages.detection.records import Targets
from stages.distillation.method import DistillationMethod
from stages.distillation.task import DistillationTask
from stages.training.clock import Clock

CASCADE = {"name": "head", "assistant": "cascade", "akd": 1, "ckd": 0, "rois": 8, "proposals": 16, "warmup": 0}


def head(student, teacher, **settings):
    choice = Choice.parse(DistillationMethod, {**CASCADE, **settings})
    return choice.cls(choice.config, student, teacher)


@pytest.fixture
def cascaded(build, teacher_settings, cascade_settings, seen):
    """A Faster R-CNN student, a cascade teacher, the method and one batch."""
    student = build(teacher_settings).train()
    teacher = build({**cascade_settings, "neck_channels": 24}).eval().requires_grad_(False)
    return student, teacher, head(student, teacher), seen(student, teacher)


def test_a_cascade_helps_a_two_stage_student(cascaded):
    student, teacher, method, batch = cascaded
    losses = method(batch)
    own = {f"assist_{term}_{stage}" for term in ("cls", "box") for stage in (1, 2, 3)}
    assert {*losses} == own | {"akd"}
    losses["akd"].backward()
    assert all(any(p.grad is not None for p in stage.parameters()) for stage in method.assistant.heads)
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in student.backbone.parameters())
    assert all(p.grad is None for p in [*student.roi_heads.parameters(), *student.rpn.parameters()])
    assert all(p.grad is None for p in teacher.parameters())


def test_akd_is_the_sum_over_two_layers_of_three_stages_on_the_assistants_rois(cascaded):
    """Written out; the second and third stage look at other RoIs than the first."""
    _, teacher, method, batch = cascaded
    torch.manual_seed(3)
    assistance = method.assistant(batch, method.config)
    first, *later = (rois.boxes_M4 for rois in assistance.rois)
    assert all(boxes.shape != first.shape or not torch.equal(boxes, first) for boxes in later)
    total = torch.zeros(())
    for number, rois in enumerate(assistance.rois):
        theirs = teacher.stages[number](batch.teacher_features.levels, rois).hidden
        mine = [assistance.hidden[2 * number + k][0] for k in (0, 1)]
        adapters = [method.akd_adapters[2 * number + k] for k in (0, 1)]
        total += sum((a(m) - t).square().mean() for a, m, t in zip(adapters, mine, theirs, strict=True))
    torch.manual_seed(3)
    torch.testing.assert_close(method(batch)["akd"], total)


def test_a_cascade_begins_with_the_teachers_weights_or_without(cascaded):
    student, teacher, method, _ = cascaded
    for mine, theirs in zip(method.assistant.heads, teacher.stages, strict=True):
        assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in mine.state_dict().items())
    other = head(student, teacher, assistant={"name": "cascade", "transfer": False}).assistant.heads[2]
    assert not torch.equal(other.box_head.fc6.weight, teacher.stages[2].box_head.fc6.weight)


def test_a_cascade_and_a_dense_student_with_ckd(cascaded, build, student_settings, seen):
    """Ours: sources outlive the refinement, so the tower can be read where the last stage's RoIs came from."""
    _, teacher, _, _ = cascaded
    student = build(student_settings).train()
    method = head(student, teacher, ckd=1)
    losses = method(seen(student, teacher))
    losses["ckd"].backward()
    assert any(p.grad.abs().sum() > 0 for p in student.head.classification_head.conv.parameters())
    assert all(p.grad is None for p in method.assistant.parameters())


def test_a_cascade_without_a_cascade_is_refused(build, student_settings, teacher_settings):
    with pytest.raises(UserError, match="needs a cascade_rcnn teacher, was given FasterRCNN"):
        head(build(student_settings), build(teacher_settings))


def test_the_whole_training_step_is_finite_without_objects(cascaded):
    student, teacher, method, batch = cascaded
    task = DistillationTask(student, teacher, {"head": method}).train()
    empty = Targets([torch.zeros(0, 4)], [torch.zeros(0, dtype=torch.int64)], [(64, 64)])
    losses = task(batch.images_BCHW[:1], empty, Clock(5, 100, 10))
    torch.stack(list(losses.values())).sum().backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(p.grad is None or p.grad.isfinite().all() for p in task.parameters())


FCOS = {"name": "fcos", "head": {"convs": 1, "reach": 2}}


def tf_head(student, **settings):
    """TF-HEAD with the FCOS assistant alone."""
    one = {"assistant": {**FCOS, **settings}}
    choice = Choice.parse(DistillationMethod, {"name": "tf_head", "warmup": 0, "assistants": {"fcos": one}})
    return choice.cls(choice.config, student, None)


@pytest.fixture
def pointed(build, student_settings, seen):
    """A RetinaNet student, TF-HEAD with an FCOS assistant, and one batch."""
    student = build(student_settings).train()
    return student, tf_head(student), seen(student)


def test_points_learn_as_the_detectors_do(pointed, build, points_settings):
    """The same head on the same levels: the losses of the detector, times the weight."""
    student, _, batch = pointed
    method, detector = tf_head(student, weight=0.5), build({**points_settings, "head_norm": "group"})
    method.assistants["fcos"].head.load_state_dict(detector.head.state_dict())
    wanted = detector.loss(detector.predict(batch.features), batch.targets)
    losses = method(batch)
    assert {*losses} == {"fcos_cls", "fcos_box", "fcos_centerness", "fcos_ckd"}
    for name, loss in wanted.items():
        torch.testing.assert_close(losses[f"fcos_{name}"], 0.5 * loss)


def test_ckd_with_points_is_summed_over_levels_and_stays_off_the_assistant(pointed):
    """Written out, with one convolution for all levels."""
    student, method, batch = pointed
    assistant, adapter = method.assistants["fcos"], method.ckd_adapters["fcos"]
    total = torch.zeros(())
    for tower, level in zip(batch.predictions.class_tower, batch.features.levels, strict=True):
        wanted = assistant.head.classification_head.conv(level).detach()
        weight = adapter.weight[:, :, 0, 0]
        given = torch.einsum("oc,bchw->bohw", weight, tower) + adapter.bias[:, None, None]
        total = total + (given - wanted).square().mean()
    found = method(batch)["fcos_ckd"]
    torch.testing.assert_close(found, total)
    found.backward()
    assert all(p.grad is None for p in assistant.parameters())
    assert any(p.grad.abs().sum() > 0 for p in student.head.classification_head.conv.parameters())
    assert all(p.grad is None for p in student.head.regression_head.parameters())


def test_own_losses_of_points_reach_the_backbone_and_not_the_students_head(pointed):
    student, method, batch = pointed
    losses = method(batch)
    (losses["fcos_cls"] + losses["fcos_box"] + losses["fcos_centerness"]).backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in student.backbone.parameters())
    assert all(p.grad is None for p in student.head.parameters())
    assert all(p.grad is not None for p in method.assistants.parameters())


def test_an_fcos_teacher_helps_a_retinanet(build, student_settings, points_settings, seen):
    """With the teacher's own features and identity adapters the imitation is nothing; else it reaches neck and assistant."""
    student = build({**student_settings, "neck_channels": 24}).train()
    teacher = build(points_settings).eval().requires_grad_(False)
    method = head(student, teacher, assistant="fcos", ckd=1)
    batch = seen(student, teacher)
    losses = method(batch)
    losses["akd"].backward(retain_graph=True)
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in student.backbone.parameters())
    assert all(p.grad is None for p in student.head.parameters())
    losses["ckd"].backward()
    assert any(p.grad.abs().sum() > 0 for p in student.head.classification_head.conv.parameters())
    for adapter in (*method.akd_adapters, *method.assistant.adapters):
        torch.nn.init.zeros_(adapter.bias)
    for adapter in method.akd_adapters:
        adapter.weight.data = torch.eye(16)[:, :, None, None]
    method.assistant.adapters = torch.nn.ModuleList(torch.nn.Identity() for _ in student.strides)
    batch.features = batch.teacher_features
    assert method(batch)["akd"].item() == 0


def test_levels_that_do_not_agree_are_refused_with_the_strides_of_both(build, student_settings, points_settings):
    student, teacher = build(student_settings), build({**points_settings, "extra_levels": 2})
    with pytest.raises(
        UserError, match=r"RetinaNet has the strides \(8, 16, 32, 64\), its teacher \(8, 16, 32, 64, 128\)"
    ):
        head(student, teacher, assistant="fcos")


def test_a_shape_beside_an_fcos_teacher_is_refused(build, student_settings, points_settings):
    with pytest.raises(UserError, match="leave `head` out"):
        head(build(student_settings), build(points_settings), assistant=FCOS)


def test_points_of_another_kind_of_teacher_are_refused(build, student_settings, teacher_settings):
    with pytest.raises(UserError, match="needs an fcos teacher or none, was given FasterRCNN"):
        head(build(student_settings), build(teacher_settings), assistant="fcos")
    with pytest.raises(UserError, match="for detectors of one kind take pkd"):
        head(build(student_settings), build(student_settings), assistant="fcos")
