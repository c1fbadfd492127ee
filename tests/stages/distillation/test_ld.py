"""LD against its authors' numbers, against numpy, its invariants, and where its gradient goes."""

import numpy as np
import pytest
import torch

from pipeline.errors import UserError
from stages.detection.assignment import atss
from stages.distillation.methods.ld import LD, Said, distribution_error, valuable

PRECISIONS = [(torch.float64, 1e-9), (torch.float32, 1e-5)]


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize(
    "name", ["ld_kl_T1_none", "ld_kl_T10_plain", "ld_kl_T10_peaky", "ld_kl_T10_weighted", "ld_kd_T2_classes"]
)
def test_divergence_equals_the_authors_code(reference, assert_near, name, dtype, tolerance):
    numbers, settings = reference(name)
    mine = numbers["pred"].to(dtype).requires_grad_()
    error = distribution_error(mine, numbers["soft_label"].to(dtype), settings["T"])
    if "weight" in numbers:
        error = error * numbers["weight"].to(dtype)
    if settings["reduction"] == "mean":
        error = error.sum() / (settings.get("avg_factor") or len(error))
    loss = settings["loss_weight"] * error
    loss.sum().backward()
    assert_near(loss, numbers["loss"], tolerance)
    assert_near(mine.grad, numbers["grad_pred"], tolerance)


def by_point(map_BCHW, *shape):
    return map_BCHW.permute(0, 2, 3, 1).flatten(1, 2).unflatten(2, shape)


@pytest.fixture
def gfls(build, distributions_settings):
    """A student, and a teacher of another depth, width and neck, with a level more."""
    student = build(distributions_settings)
    wide = {**distributions_settings, "neck": "fpn", "extra_levels": 2, "neck_channels": 24, "head_norm": "group"}
    return student, build(wide).eval().requires_grad_(False)


@pytest.mark.parametrize("name", ["ld_head_level", "ld_head_level_nopos"])
def test_the_whole_of_a_level_equals_the_authors_code(reference, gfls, assert_near, name):
    numbers, settings = reference(name)
    config = LD.Config(main=settings["w_ld"], valuable=settings["w_ld_vlr"], cls=settings["w_kd"])
    bins = settings["reg_max"] + 1
    sides, logits = numbers["bbox_pred"].requires_grad_(), numbers["cls_score"].requires_grad_()
    own = Said(by_point(sides, 4, bins), by_point(logits, settings["num_classes"]))
    guide = Said(by_point(numbers["soft_targets"], 4, bins), by_point(numbers["soft_label"], settings["num_classes"]))
    positive = numbers["labels"] < settings["num_classes"]
    losses = LD(config, *gfls).terms(own, guide, positive, numbers["vlr_region"])
    assert_near(losses["main"], numbers["loss_ld"], scale=1e-9)
    assert_near(losses["valuable"], numbers["loss_ld_vlr"])
    assert_near(losses["cls"] * max(1, positive.sum()) / settings["num_total_samples"], numbers["loss_kd"], scale=1e-9)
    sum(losses.values()).backward()
    assert_near(sides.grad, numbers["grad_bbox_pred_of_ld_vlr_kd"], scale=1e-9)
    assert_near(logits.grad, numbers["grad_cls_score_of_ld_vlr_kd"], scale=1e-9)


def test_valuable_region_is_the_papers(reference):
    """The released code has another region, by a DIoU whose overlap is divided by the anchor's area."""
    numbers, _ = reference("ld_vlr_region")
    anchors, truth = numbers["anchors"], numbers["gt_bboxes"]
    assignment = atss(truth, anchors, numbers["num_level_anchors"].tolist())
    found = valuable(assignment, anchors, truth, 0.25)
    torch.testing.assert_close(found, numbers["vlr_region_if_true_diou"], rtol=1e-6, atol=1e-7)
    assert not torch.equal(found > 0, numbers["vlr_region"] > 0)


@pytest.fixture
def logits():
    number = torch.arange(24).double().view(2, 3, 4)
    return torch.sin(number * 0.7), 2 * torch.cos(number * 1.3)


def test_golden_divergence(logits):
    mine, theirs = (x.numpy() / 3 for x in logits)
    s, t = (np.exp(x) / np.exp(x).sum(2, keepdims=True) for x in (mine, theirs))
    golden = 9 * (t * np.log(t / s)).mean(2)
    assert distribution_error(*logits, 3.0).numpy() == pytest.approx(golden, rel=1e-12)


def test_equal_distributions_lose_nothing_and_a_shift_of_the_logits_does_not_matter(logits):
    mine, theirs = logits
    assert distribution_error(theirs, theirs, 10.0).abs().max() == 0
    assert distribution_error(theirs + 3, theirs, 10.0).abs().max() < 1e-12
    assert (distribution_error(mine, theirs, 10.0) > 0).all()
    assert distribution_error(1e4 * mine, theirs, 1.0).isfinite().all()


def test_at_a_high_temperature_it_is_half_the_mean_square_of_the_centred_logits(logits):
    """KL of two nearly uniform distributions, to the second order; tau^2 keeps it from vanishing."""
    mine, theirs = (x - x.mean(2, keepdim=True) for x in logits)
    wanted = (mine - theirs).square().mean(2) / (2 * mine.shape[2])
    torch.testing.assert_close(distribution_error(*logits, 1e4), wanted, rtol=1e-3, atol=0)


def test_gradient_is_that_of_finite_differences_and_reaches_the_student_only(logits):
    mine, theirs = (x.clone().requires_grad_() for x in logits)
    assert torch.autograd.gradcheck(lambda s: distribution_error(s, theirs.detach(), 2.0), mine)
    distribution_error(mine, theirs, 2.0).sum().backward()
    assert theirs.grad is None


def test_points_of_shared_levels_learn_and_nobody_elses(gfls, seen):
    student, teacher = gfls
    method = LD(LD.Config(), student, teacher)
    assert method.pairs == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert not list(method.parameters())
    batch = seen(student, teacher)
    batch.predictions.sides_BA4N.retain_grad()
    losses = method(batch)
    losses["main"].backward(retain_graph=True)
    match = torch.stack([student.assign(t, batch.predictions.anchors).match_A for t in batch.targets.boxes])
    assert torch.equal(batch.predictions.sides_BA4N.grad.abs().sum((2, 3)) > 0, match >= 0)
    sum(losses.values()).backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert student.head.regression_head.bbox_reg.weight.grad.abs().sum() > 0


def test_normalised_by_the_weights(gfls, logits):
    sides = [x.view(1, 2, 3, 4).repeat(1, 1, 2, 1)[:, :, :4] * 5 for x in logits]
    classes = [x[None, :, 0] + 4 for x in logits]
    own, guide = (Said(*one) for one in zip(sides, classes, strict=True))
    positive, region = torch.tensor([[True, True]]), torch.tensor([[0.7, 0.9]]).double()
    plain, divided = (LD(LD.Config(normalise=on), *gfls).terms(own, guide, positive, region) for on in (False, True))
    weight = own.logits_BAK.sigmoid().amax(2).sum().item()
    assert weight > 1
    assert divided["main"].item() == pytest.approx(plain["main"].item() / weight)
    assert divided["valuable"].item() == pytest.approx(plain["valuable"].item() / 1.6)
    assert divided["cls"].item() == plain["cls"].item()


def test_pairs_that_do_not_fit_are_refused(build, gfls, distributions_settings, student_settings, teacher_settings):
    student, teacher = gfls
    with pytest.raises(UserError, match=r"method ld: .*was given RetinaNet and GFL"):
        LD(LD.Config(), build(student_settings), teacher)
    with pytest.raises(UserError, match=r"method ld: .*was given GFL and FasterRCNN"):
        LD(LD.Config(), student, build(teacher_settings))
    with pytest.raises(UserError, match=r"the student has bins: 8, the teacher 5"):
        LD(LD.Config(), student, build({**distributions_settings, "bins": 5}))
    student.strides = (256, 512)
    with pytest.raises(UserError, match=r"method ld: .*\[256, 512\]"):
        LD(LD.Config(), student, teacher)
