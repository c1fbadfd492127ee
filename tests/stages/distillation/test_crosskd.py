"""CrossKD against its authors' numbers, against numpy, and the paths of its gradient."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import box_iou, generalized_box_iou
from torchvision.ops.misc import Conv2dNormActivation

from pipeline.errors import UserError
from stages.detection.dense_head import by_anchor
from stages.detection.generalised_focal import quality_focal
from stages.detection.records import Anchors, DensePredictions, Features, Targets
from stages.distillation.method import DistillationBatch
from stages.distillation.methods.crosskd import (
    CrossKD,
    box_error,
    crossed,
    restandardised,
)
from stages.training.clock import Clock

PRECISIONS = [(torch.float64, 1e-9), (torch.float32, 1e-5)]
EPS = torch.finfo(torch.float32).eps  # the original adds it to the number of positives


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("name", ["crosskd_qfl_beta1", "crosskd_qfl_beta2_mean", "crosskd_qfl_large_logits"])
def test_classification_equals_the_authors_code(reference, assert_near, name, dtype, tolerance):
    numbers, settings = reference(name)
    logits = numbers["pred"].to(dtype).requires_grad_()
    focal = quality_focal(logits, numbers["target_logits"].to(dtype).sigmoid(), settings["beta"])
    if "weight" in numbers:
        loss = (focal.sum(1) * numbers["weight"].to(dtype)).sum() / (settings["avg_factor"] + EPS)
    else:
        loss = focal.mean()
    loss.backward()
    assert_near(loss, numbers["loss"], tolerance)
    assert_near(logits.grad, numbers["grad_pred"], tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("crosskd_giou", "giou"),
        ("crosskd_giou_special", "giou"),
        ("crosskd_giou_zero_weight", "giou"),
        ("crosskd_iou_log", "iou"),
    ],
)
def test_box_loss_equals_the_authors_code(reference, assert_near, name, kind, dtype, tolerance):
    numbers, settings = reference(name)
    boxes = numbers["pred"].to(dtype).requires_grad_()
    error = box_error(boxes, numbers["target"].to(dtype), kind)
    weighted = error * numbers.get("weight", torch.ones(())).to(dtype)
    count = settings["avg_factor"] + EPS if settings["avg_factor"] else len(boxes)
    loss = settings["loss_weight"] * weighted.sum() / count
    loss.backward()
    assert_near(loss, numbers["loss"], tolerance)
    assert_near(boxes.grad, numbers["grad_pred"], tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("name", ["crosskd_align", "crosskd_align_dead"])
def test_change_of_statistics_equals_the_authors_code(reference, assert_near, name, dtype, tolerance):
    numbers, settings = reference(name)
    mine = numbers["stu_feat"].to(dtype).requires_grad_()
    out = restandardised(mine, numbers["tea_feat"].to(dtype), settings["eps"])
    assert_near(out, numbers["out"], tolerance)
    out.backward(numbers["upstream"].to(dtype))
    assert_near(mine.grad, numbers["grad_stu_feat"], tolerance)


RETINA = {"cls_convs": "classification_head.conv", "reg_convs": "regression_head.conv"}
OUTPUTS = {"retina_cls": "classification_head.cls_logits", "retina_reg": "regression_head.bbox_reg"}


def our_name(key):
    """`cls_convs.0.conv.weight` and `retina_cls.bias` as the parameters of our head."""
    first, *rest = key.split(".")
    return f"{RETINA[first]}.{rest[0]}.0.{rest[2]}" if first in RETINA else f"{OUTPUTS[first]}.{rest[0]}"


def of_authors(build, numbers, convs):
    """Method and batch of one level, with the authors' heads, anchors, ignored anchors and number of positives."""
    settings = {"name": "retinanet", "backbone": "tiny", "neck_channels": 8, "head_convs": 4, "extra_levels": 0}
    student, teacher = build(settings, 3).double(), build(settings, 3).double().eval().requires_grad_(False)
    for detector, prefix in ((student, "stu_"), (teacher, "tea_")):
        own = {
            k.removeprefix(prefix): v
            for k, v in numbers.items()
            if k.startswith((f"{prefix}cls_convs", f"{prefix}reg_convs", f"{prefix}retina"))
        }
        detector.head.load_state_dict({our_name(key): value for key, value in own.items()})
    method = CrossKD(CrossKD.Config(convs=convs), student, teacher).double()
    method.pairs = [(0, 0)]
    anchors = numbers["anchors"]
    assert (anchors == anchors[0]).all()
    mine, theirs = numbers["stu_x"].requires_grad_(), numbers["tea_x"]
    logits, deltas = (by_anchor(numbers[f"tea_{k}"], n) for k, n in (("cls_score", 3), ("bbox_pred", 4)))
    boxes = BoxCoder((1.0, 1.0, 1.0, 1.0)).decode_single(deltas.flatten(0, 1), anchors.flatten(0, 1)).view_as(deltas)
    shape = Anchors(anchors[0], (tuple(mine.shape[-2:]),), 9)
    predictions = DensePredictions((), (), logits, deltas, boxes, shape)
    size = (32, 40)
    batch = SimpleNamespace(
        student=student,
        teacher=teacher,
        features=Features((), (mine,), size),
        teacher_features=Features((), (theirs,), size),
        teacher_predictions=predictions,
        targets=None,
    )
    return method, batch, mine


@pytest.mark.parametrize(("name", "convs"), [("crosskd_full_retina", 3), ("crosskd_full_retina_idx0", 0)])
def test_the_whole_equals_the_authors_code(reference, build, assert_near, monkeypatch, name, convs):
    numbers, settings = reference(name)
    assert settings["reused_teacher_head_idx"] == convs
    method, batch, mine = of_authors(build, numbers, convs)
    considered = numbers["label_weights"], numbers["avg_factor"] + EPS
    monkeypatch.setattr(CrossKD, "_considered", lambda *_: considered)
    losses = method(batch)
    assert_near(losses["cls"], numbers["loss_cls_kd"])
    assert_near(losses["box"], numbers["loss_reg_kd"])
    sum(losses.values()).backward()
    assert_near(mine.grad, numbers["grad_stu_x"])
    for key, parameter in batch.student.head.named_parameters():
        wanted = {
            our_name(k.removeprefix("grad_stu_")): v
            for k, v in numbers.items()
            if k.startswith("grad_stu_") and "." in k
        }
        if key in wanted:
            assert_near(parameter.grad, wanted[key])
        else:
            assert parameter.grad is None
    logits, boxes = method._reused(batch, batch.teacher, batch.teacher_predictions, 0, 0)
    assert_near(logits, by_anchor(numbers["reused_cls_score"], 3))
    assert boxes.shape == (len(mine), 9 * mine[0, 0].numel(), 4)


def test_classification_through_towers_with_group_norm_equals_the_authors_code(reference, assert_near):
    """GFL's class branch; its box branch has distributions, which none of our detectors has."""
    numbers, settings = reference("crosskd_full_gfl")

    def tower(prefix):
        blocks = [Conv2dNormActivation(8, 8, norm_layer=lambda c: nn.GroupNorm(4, c), inplace=False) for _ in range(4)]
        layers = nn.Sequential(*blocks).double()
        for k, block in enumerate(layers):
            part = f"{prefix}_cls_convs.{k}"
            block[0].load_state_dict({"weight": numbers[f"{part}.conv.weight"]})
            block[1].load_state_dict({p: numbers[f"{part}.gn.{p}"] for p in ("weight", "bias")})
        return layers

    output = nn.Conv2d(8, 3, 3, padding=1).double()
    output.load_state_dict({p: numbers[f"tea_gfl_cls.{p}"] for p in ("weight", "bias")})
    student, teacher = tower("stu"), tower("tea")
    held, wanted = student[:3](numbers["stu_x"]), teacher[:3](numbers["tea_x"])
    assert_near(held, numbers["stu_cls_hold"])
    assert_near(wanted, numbers["tea_cls_hold"])
    logits = crossed(nn.Sequential(teacher[3], output), held, wanted, rectify=True)
    assert_near(logits, numbers["reused_cls_score"])
    focal = quality_focal(by_anchor(logits, 3), by_anchor(numbers["tea_cls_score"], 3).sigmoid(), settings["beta"])
    loss = (focal.sum(2) * numbers["label_weights"]).sum() / (settings["avg_factor"] + EPS)
    assert_near(loss, numbers["loss_cls_kd"], 1e-7)  # the original rounds to single precision inside
    loss.backward()
    for k, block in enumerate(student[:3]):
        assert_near(block[0].weight.grad, numbers[f"grad_stu_cls_convs.{k}.conv.weight"], 1e-6)
        assert_near(block[1].bias.grad, numbers[f"grad_stu_cls_convs.{k}.gn.bias"], 1e-6)


def test_golden_quality_focal():
    logits, wanted = torch.tensor([[0.3, -2.0]]).double(), torch.tensor([[1.5, -0.5]]).double()
    p, q = (1 / (1 + np.exp(-x.numpy())) for x in (logits, wanted))
    golden = np.abs(p - q) ** 1.5 * -(q * np.log(p) + (1 - q) * np.log(1 - p))
    assert quality_focal(logits, wanted.sigmoid(), 1.5).numpy() == pytest.approx(golden, rel=1e-12)


def test_no_gradient_for_what_the_teacher_says():
    theirs = torch.tensor([[0.0, 0, 2, 2]], requires_grad=True)
    mine = torch.tensor([[1.0, 0, 3, 2]], requires_grad=True)
    box_error(mine, theirs).sum().backward()
    restandardised(mine.view(1, 1, 2, 2), theirs.view(1, 1, 2, 2)).square().sum().backward()
    assert theirs.grad is None
    assert mine.grad is not None


def test_golden_box_errors():
    boxes, wanted = torch.tensor([[0.0, 0, 4, 4], [0, 0, 2, 2]]), torch.tensor([[2.0, 2, 6, 6], [4, 0, 6, 2]])
    assert box_error(boxes, wanted, "iou").tolist() == pytest.approx([-np.log(4 / 28), -np.log(1e-6)])
    assert box_error(boxes, wanted).tolist() == pytest.approx([1 - 4 / 28 + 8 / 36, 1 + 4 / 12])
    torch.testing.assert_close(box_error(boxes, wanted), 1 - generalized_box_iou(boxes, wanted).diag())


@pytest.fixture
def maps():
    number = torch.arange(2 * 3 * 4 * 5).double().view(2, 3, 4, 5)
    return torch.sin(number * 0.7), 2 * torch.cos(number * 1.3) + 5


def test_golden_change_of_statistics(maps):
    mine, theirs = (m.numpy() for m in maps)
    axes = {"axis": (0, 2, 3), "keepdims": True}
    golden = (mine - mine.mean(**axes)) / (mine.std(ddof=1, **axes) + 1e-6) * theirs.std(ddof=1, **axes)
    golden += theirs.mean(**axes)
    assert restandardised(*maps).numpy() == pytest.approx(golden, rel=1e-12)


def test_maps_behind_a_relu_are_behind_one_again(maps):
    mine, theirs = maps[0], maps[1] - 5
    entering = restandardised(mine, theirs)
    assert entering.min() < 0
    assert torch.equal(crossed(nn.Identity(), mine, theirs, rectify=True), entering.clamp(min=0))
    assert torch.equal(crossed(nn.Identity(), mine, theirs, rectify=False), entering)


def test_change_of_statistics_ignores_scale_and_shift_and_survives_dead_channels(maps):
    mine, theirs = maps
    torch.testing.assert_close(restandardised(7 * mine - 3, theirs), restandardised(mine, theirs), rtol=1e-5, atol=1e-5)
    dead = torch.zeros_like(mine).requires_grad_()
    out = restandardised(dead, theirs)
    torch.testing.assert_close(out, theirs.mean((0, 2, 3), keepdim=True).expand_as(out))
    out.sum().backward()
    assert dead.grad.isfinite().all()
    one = restandardised(mine[:1, :, :1, :1], theirs[:1, :, :1, :1])
    torch.testing.assert_close(one, theirs[:1, :, :1, :1])


def test_gradients_are_those_of_finite_differences(maps):
    mine, theirs = (m[:, :2, :2, :3].clone() for m in maps)
    tail = nn.Conv2d(2, 3, 1).double()
    assert torch.autograd.gradcheck(lambda s: crossed(tail, s, theirs, rectify=True), mine.requires_grad_())
    logits, wanted = mine.detach().flatten(1).requires_grad_(), theirs.flatten(1)
    assert torch.autograd.gradcheck(lambda x: quality_focal(x, wanted.sigmoid(), 1.0), logits)
    boxes = torch.tensor([[0.0, 1, 4, 5], [0, 0, 2, 2]]).double().requires_grad_()
    target = torch.tensor([[2.0, 2, 6, 6], [4, 0.5, 6, 3]]).double()
    assert torch.autograd.gradcheck(lambda b: box_error(b, target), boxes)


@pytest.fixture
def trained(build, student_settings):
    """CrossKD on a tiny student and a larger RetinaNet with other anchors, strides and widths, and one batch."""
    student = build({**student_settings, "head_convs": 2}).train()
    wide = {**student_settings, "extra_levels": 0, "neck_channels": 24, "head_convs": 4, "anchor_octaves": 1}
    teacher = build(wide).eval().requires_grad_(False)
    method = CrossKD(CrossKD.Config(), student, teacher)
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    targets = Targets(
        [torch.tensor([[4.0, 4, 38, 36]]), torch.zeros(0, 4)],
        [torch.tensor([1]), torch.zeros(0, dtype=torch.int64)],
        [(64, 96)] * 2,
    )
    return student, teacher, method, batch_of(student, teacher, images, targets)


def batch_of(student, teacher, images, targets):
    features = student.features(images)
    predictions = student.predict(features, targets)
    return DistillationBatch(images, targets, student, features, predictions, Clock(5, 100, 10), teacher)


def test_golden_losses(trained):
    """From what the crossed features predict on, in numpy."""
    _, teacher, method, batch = trained
    wanted = {"cls": 0.0, "box": 0.0}
    predictions = batch.teacher_predictions
    overlap = box_iou(batch.targets.boxes[0], predictions.anchors.boxes_A4)[0]
    best = overlap == overlap.max()
    counted = torch.ones(2, len(overlap))
    counted[0] = ((overlap < 0.4) | (overlap >= 0.5) | best).float()
    assert (counted[0] == 0).any()
    positives = ((overlap >= 0.5) | best).sum().item()
    begin = 0
    for level, count in enumerate(predictions.anchors.per_level):
        part = slice(begin, begin + count)
        with torch.no_grad():
            logits, boxes = method._reused(batch, teacher, predictions, level, level)
        p, q = (1 / (1 + np.exp(-x.double().numpy())) for x in (logits, predictions.logits_BAK[:, part]))
        focal = np.abs(p - q) * -(q * np.log(p) + (1 - q) * np.log(1 - p))
        wanted["cls"] += (focal.sum(2) * counted[:, part].numpy()).sum() / positives
        theirs = predictions.boxes_BA4[:, part]
        giou = torch.stack([generalized_box_iou(a, b).diag() for a, b in zip(boxes, theirs, strict=True)]).numpy()
        wanted["box"] += ((1 - giou) * q.max(2) * counted[:, part].numpy()).sum() / positives
        begin += count
    found = {name: loss.item() for name, loss in method(batch).items()}
    assert found == pytest.approx(wanted, rel=1e-4)


def test_gradient_reaches_towers_neck_and_adapters_but_not_the_students_outputs(trained):
    student, teacher, method, batch = trained
    assert method.pairs == [(0, 0), (1, 1), (2, 2)]
    sum(method(batch).values()).backward()
    head = student.head
    for module in (head.classification_head.conv, head.regression_head.conv, student.backbone, method):
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
    for module in (head.classification_head.cls_logits, head.regression_head.bbox_reg):
        assert all(p.grad is None for p in module.parameters())
    assert all(p.grad is None for p in teacher.parameters())


def test_an_fcos_student_fits_but_is_no_teacher(trained, build, student_settings):
    _, teacher, _, batch = trained
    shared = {k: v for k, v in student_settings.items() if k not in ("anchor_scale", "aspect_ratios")}
    student = build({**shared, "name": "fcos", "head_convs": 3}).train()
    method = CrossKD(CrossKD.Config(), student, teacher)
    sum(method(batch_of(student, teacher, batch.images_BCHW, batch.targets)).values()).backward()
    towers = student.head.classification_head.conv, student.head.regression_head.conv
    assert all(p.grad.isfinite().all() and p.grad.any() for tower in towers for p in tower[-1].parameters())
    with pytest.raises(UserError, match="was given RetinaNet and FCOS"):
        CrossKD(CrossKD.Config(), teacher, student)


def test_each_loss_reaches_its_own_tower_only(trained):
    student, _, method, batch = trained
    method(batch)["cls"].backward()
    assert all(p.grad is not None for p in student.head.classification_head.conv.parameters())
    assert all(p.grad is None for p in student.head.regression_head.parameters())


def test_a_copy_of_the_teacher_loses_nothing(trained):
    _, teacher, _, batch = trained
    student = copy.deepcopy(teacher)
    method = CrossKD(CrossKD.Config(), student, teacher)
    assert not list(method.parameters())
    losses = method(batch_of(student, teacher, batch.images_BCHW, batch.targets))
    assert losses["box"].item() == pytest.approx(0, abs=1e-3)  # eps of the deviation
    assert losses["cls"].item() == pytest.approx(0, abs=1e-3)


def test_only_anchors_between_background_and_object_are_left_out(trained):
    _, teacher, method, batch = trained
    predictions = batch.teacher_predictions
    weight, positives = method._considered(teacher, predictions, batch.targets)
    assert (weight[1] == 1).all()
    assert positives >= 1
    overlap = box_iou(batch.targets.boxes[0], predictions.anchors.boxes_A4)[0]
    assert (weight[0][overlap >= 0.5] == 1).all()
    assert (weight[0][overlap < 0.4] == 1).all()
    between = (overlap >= 0.4) & (overlap < 0.5)
    assert between.any()
    assert (weight[0][between] == 0).all()
    none = Targets([torch.zeros(0, 4)] * 2, batch.targets.labels, batch.targets.sizes)
    assert method._considered(teacher, predictions, none)[1] == 1


def test_one_small_image_without_objects_is_finite(build, student_settings):
    settings = {**student_settings, "head_norm": "none", "head_convs": 4}  # group norm refuses one value a channel
    student, teacher = build(settings).eval(), build(settings).eval().requires_grad_(False)
    method = CrossKD(CrossKD.Config(), student, teacher)
    targets = Targets([torch.zeros(0, 4)], [torch.zeros(0, dtype=torch.int64)], [(32, 32)])
    batch = batch_of(student, teacher, torch.zeros(1, 3, 32, 32, dtype=torch.uint8), targets)
    assert batch.features.levels[2].shape[-2:] == (1, 1)
    losses = method(batch)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(p.grad is None or p.grad.isfinite().all() for p in [*student.parameters(), *method.parameters()])


def test_pairs_that_do_not_fit_are_refused(build, student_settings, teacher_settings):
    student, two_stage = build(student_settings), build(teacher_settings)
    with pytest.raises(UserError, match=r"method crosskd: .*was given RetinaNet and FasterRCNN"):
        CrossKD(CrossKD.Config(), student, two_stage)
    with pytest.raises(UserError, match=r"method crosskd: .*was given FasterRCNN and RetinaNet"):
        CrossKD(CrossKD.Config(), two_stage, student)
    with pytest.raises(UserError, match="after 3 convolutions, the teacher's towers have 1; give convs: 1 or less"):
        CrossKD(CrossKD.Config(), student, build(student_settings))
    far = build(student_settings)
    far.strides = (128, 256)
    with pytest.raises(UserError, match=r"method crosskd: .*\[8, 16, 32, 64\].*\[128, 256\]"):
        CrossKD(CrossKD.Config(convs=1), student, far)
