"""Task-adaptive distillation against its equations in numpy, and by its invariants. Its authors published no code."""

import math

import numpy as np
import pytest
import torch
from torchvision.models.detection._utils import BoxCoder

from pipeline.config import Choice
from pipeline.errors import ConfigError, UserError
from stages.detection.records import RoIActivations, RoIs, Targets
from stages.distillation.method import DistillationBatch, DistillationMethod
from stages.distillation.methods.task_adaptive import (
    box_transfer,
    class_transfer,
    clipped,
    decayed,
    gaussian_mask,
    joined,
    judged_anchors,
    judged_rois,
    masked_difference,
    paired_iou,
)
from stages.distillation.task import DistillationTask
from stages.training.clock import Clock


def box(*corners):
    return torch.tensor([corners], dtype=torch.float64)


def mask_by_numpy(boxes, shape, stride):
    """The equation, cell by cell."""
    result = np.zeros(shape)
    for x1, y1, x2, y2 in boxes:
        for row in range(shape[0]):
            for column in range(shape[1]):
                x, y = (column + 0.5) * stride, (row + 0.5) * stride
                if x1 <= x <= x2 and y1 <= y <= y2:
                    u, v = (x - (x1 + x2) / 2) / ((x2 - x1) / 2), (y - (y1 + y2) / 2) / ((y2 - y1) / 2)
                    result[row, column] = max(result[row, column], math.exp(-(u**2) / 2 - v**2 / 2))
    return result


def test_mask_is_that_of_the_equation():
    boxes = torch.tensor([[3.0, 5, 61, 40], [30, 20, 100, 90], [70, 0, 128, 30]]).double()
    found = gaussian_mask(boxes, (12, 16), 8)
    np.testing.assert_allclose(found.numpy(), mask_by_numpy(boxes.tolist(), (12, 16), 8), rtol=1e-12)
    assert found.min() == 0
    assert found.max() <= 1


def test_mask_at_centre_edge_and_corner():
    """A box whose centre, edges and corners are centres of cells: 1, e^-1/2 and e^-1; the mean inside is .7321."""
    mask = gaussian_mask(box(4, 4, 36, 36), (5, 5), 8)
    assert mask[2, 2] == 1
    assert mask[2, [0, 4]].tolist() == pytest.approx([math.exp(-0.5)] * 2)
    assert mask[[0, 0, 4, 4], [0, 4, 0, 4]].tolist() == pytest.approx([math.exp(-1)] * 4)
    assert gaussian_mask(box(0, 0, 1024, 1024), (512, 512), 2).mean().item() == pytest.approx(0.7321, abs=1e-4)
    assert gaussian_mask(box(4, 4, 36, 36), (5, 5), 8, variance=1.0)[2, 0].item() == pytest.approx(math.exp(-1))


def test_mask_flips_with_the_image():
    boxes = torch.tensor([[3.0, 5, 61, 40], [30, 20, 100, 90]]).double()
    flipped = boxes.clone()
    flipped[:, [0, 2]] = 128 - boxes[:, [2, 0]]
    torch.testing.assert_close(gaussian_mask(flipped, (12, 16), 8), gaussian_mask(boxes, (12, 16), 8).flip(1))


def test_mask_of_two_boxes_is_the_larger_of_theirs():
    one, two = box(3, 5, 61, 40), box(30, 20, 100, 90)
    masks = [gaussian_mask(b, (12, 16), 8) for b in (one, two, torch.cat([one, two]))]
    assert torch.equal(masks[2], torch.maximum(masks[0], masks[1]))
    assert gaussian_mask(torch.zeros(0, 4), (3, 4), 8).abs().max() == 0


def test_mask_scales_and_moves_with_its_box():
    one = box(10, 12, 50, 40)
    torch.testing.assert_close(gaussian_mask(2 * one, (12, 16), 16), gaussian_mask(one, (12, 16), 8))
    moved = gaussian_mask(one + torch.tensor([16.0, 8, 16, 8]), (12, 16), 8)
    torch.testing.assert_close(moved[1:, 2:], gaussian_mask(one, (12, 16), 8)[:-1, :-2])


@pytest.mark.parametrize("corners", [(17, 9, 19, 11), (25, 17, 25, 17), (25.0, 1, 26, 60), (200, 200, 220, 220)])
def test_a_box_without_a_cells_centre_marks_the_cell_of_its_own(corners):
    mask = gaussian_mask(box(*corners), (8, 8), 8)
    x, y = (corners[0] + corners[2]) / 2, (corners[1] + corners[3]) / 2
    assert mask[min(7, int(y // 8)), min(7, int(x // 8))] == 1
    assert mask.sum() == 1
    assert mask.isfinite().all()


def test_masked_difference_by_numpy_and_blind_outside():
    generator = torch.Generator().manual_seed(0)
    mine, theirs = (torch.randn((2, 3, 4, 5), generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.rand((2, 4, 5), generator=generator, dtype=torch.float64)
    mask[:, :2] = 0
    s, t, m = mine.numpy(), theirs.numpy(), mask.numpy()
    wanted = (m[:, None] * (s - t) ** 2).sum() / (2 * 3 * m.sum())
    loss = masked_difference(mine, theirs, mask)
    assert loss.item() == pytest.approx(wanted, rel=1e-12)
    changed = mine.clone()
    changed[:, :, :2] += 100
    assert masked_difference(changed, theirs, mask).item() == loss.item()
    assert masked_difference(theirs, theirs, mask).item() == 0
    assert masked_difference(mine, theirs, torch.zeros_like(mask)).item() == 0
    assert masked_difference(mine, theirs, mask / 1e3).item() < loss.item() / 2  # N is 1 at least
    assert torch.autograd.gradcheck(lambda x: masked_difference(x, theirs, mask), mine.requires_grad_())


@pytest.fixture
def probabilities():
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn((7, 4), generator=generator, dtype=torch.float64) for _ in range(2)]
    return (*(each.softmax(1) for each in logits), torch.tensor([0, 1, 2, 3, 0, 1, 2]))


@pytest.mark.parametrize("gate", ["better", "correct"])
@pytest.mark.parametrize("divergence", ["bce", "kl"])
def test_class_transfer_by_numpy(probabilities, gate, divergence):
    mine, theirs, label = probabilities
    p, q = mine.numpy(), theirs.numpy()
    bce, kl = -(q * np.log(p) + (1 - q) * np.log(1 - p)), q * np.log(q / p)
    rows = (bce if divergence == "bce" else kl).sum(1)
    where = np.arange(7), label.numpy()
    chosen = q[where] > p[where] if gate == "better" else q.argmax(1) == where[1]
    assert 0 < chosen.sum() < 7
    found = class_transfer(mine, theirs, label, gate, divergence)
    assert found.item() == pytest.approx(rows[chosen].mean(), rel=1e-9)
    order = torch.tensor([3, 1, 0, 6, 5, 4, 2])
    again = class_transfer(mine[order], theirs[order], label[order], gate, divergence)
    assert again.item() == pytest.approx(found.item(), rel=1e-12)


def test_a_teacher_that_is_not_better_teaches_no_class(probabilities):
    mine, _, label = probabilities
    worse = (1 - torch.nn.functional.one_hot(label, 4)).double() / 3
    for theirs in (mine.clone(), worse):
        student = mine.clone().requires_grad_()
        loss = class_transfer(student, theirs, label, "better", "bce")
        loss.backward()
        assert loss.item() == 0
        assert student.grad.abs().max() == 0


def test_where_both_agree_the_correct_gate_moves_nothing():
    logits = torch.randn((5, 4), generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    label = logits.argmax(1)
    loss = class_transfer(logits.softmax(1), logits.detach().softmax(1), label, "correct", "bce")
    loss.backward()
    assert loss.item() > 0  # the entropy of the target
    assert logits.grad.abs().max() < 1e-12


def test_certain_probabilities_are_finite():
    mine = torch.tensor([[1.0, 0], [0, 1]]).requires_grad_()
    loss = class_transfer(mine, torch.tensor([[0.0, 1], [1, 0]]), torch.tensor([1, 0]), "better", "bce")
    loss.backward()
    assert loss.item() == pytest.approx(-2 * math.log(1e-6), rel=1e-3)
    assert mine.grad.isfinite().all()


def test_class_gradient_is_that_of_finite_differences(probabilities):
    _, theirs, label = probabilities
    logits = torch.randn((7, 4), generator=torch.Generator().manual_seed(3), dtype=torch.float64).requires_grad_()
    for divergence in ("bce", "kl"):
        assert torch.autograd.gradcheck(
            lambda x, kind=divergence: class_transfer(x.softmax(1), theirs, label, "correct", kind), logits
        )


CODER = BoxCoder((10.0, 10.0, 5.0, 5.0))


def judged(start, truth, teacher_deltas, student_deltas=None):
    """One class and background, all rows on objects."""
    count = len(start)
    student_deltas = torch.zeros(count, 4, dtype=start.dtype) if student_deltas is None else student_deltas
    rois = RoIs(start, torch.zeros(count).long(), torch.zeros(count).long(), torch.zeros(count).long(), truth)
    both = [torch.stack([torch.zeros_like(d), d], 1) for d in (student_deltas, teacher_deltas)]
    logits = torch.zeros(count, 2, dtype=start.dtype)
    activations = [RoIActivations((), logits, deltas) for deltas in both]
    return judged_rois(*activations, rois, CODER, [(500, 500)])


@pytest.fixture
def places():
    truth = torch.tensor([[10.0, 10, 60, 50], [100, 30, 180, 120], [200, 200, 260, 300]]).double()
    return truth + torch.tensor([[4.0, -3, 6, 2], [-9, 5, 3, -8], [5, 5, -6, 9]]).double(), truth


def test_iou_by_pairs(places):
    from torchvision.ops import box_iou

    torch.testing.assert_close(paired_iou(*places), box_iou(*places).diagonal())
    assert paired_iou(torch.zeros(2, 4), torch.zeros(2, 4)).tolist() == [0, 0]


def test_a_perfect_teacher_teaches_every_box(places):
    start, truth = places
    perfect = CODER.encode_single(truth, start)
    rows, d = judged(start, truth, perfect), perfect.numpy()
    torch.testing.assert_close(rows.teacher_boxes_P4, truth)
    wanted = np.where(np.abs(d) < 1, d**2 / 2, np.abs(d) - 0.5).sum(1).mean()
    assert box_transfer(rows, "improves_proposal", 1.0).item() == pytest.approx(wanted, rel=1e-9)
    assert box_transfer(rows, "beats_student", 1.0).item() == pytest.approx(wanted, rel=1e-9)
    again = judged(start.flip(0), truth.flip(0), perfect.flip(0))
    assert box_transfer(again, "improves_proposal", 1.0).item() == pytest.approx(wanted, rel=1e-9)


def test_only_the_boxes_that_the_teacher_improves_are_taught(places):
    """The first is perfect, the second stays where it was, the third gets worse."""
    start, truth = places
    deltas = CODER.encode_single(truth, start)
    deltas[1] = 0
    deltas[2] *= -1
    student = torch.ones(3, 4).double().requires_grad_()
    rows = judged(start, truth, deltas, student)
    box_transfer(rows, "improves_proposal", 1.0).backward()
    assert (student.grad.abs().sum(1) > 0).tolist() == [True, False, False]
    mine = deltas.clone().requires_grad_()  # a student that says the same is not beaten by a strict >
    loss = box_transfer(judged(start, truth, deltas, mine), "beats_student", 1.0)
    loss.backward()
    assert loss.item() == 0
    assert mine.grad.abs().max() == 0


def test_box_gradient_is_that_of_finite_differences(places):
    start, truth = places
    perfect = CODER.encode_single(truth, start)
    given = torch.randn((3, 4), generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    for gate in ("improves_proposal", "beats_student"):
        assert torch.autograd.gradcheck(
            lambda d, kind=gate: box_transfer(judged(start, truth, perfect, d), kind, 0.5), given
        )


def test_without_positives_the_box_loss_is_zero_with_a_gradient():
    none = torch.zeros(0, 4, dtype=torch.float64)
    given = none.clone().requires_grad_()
    loss = box_transfer(judged(none, none, none, given), "improves_proposal", 1.0)
    loss.backward()
    assert loss.item() == 0


def test_boxes_are_clipped_to_their_own_image():
    boxes = torch.tensor([[-5.0, -5, 300, 300], [-5, -5, 300, 300]])
    assert clipped(boxes, torch.tensor([1, 0]), [(100, 200), (50, 60)]).tolist() == [[0, 0, 60, 50], [0, 0, 200, 100]]


def test_decay():
    epochs = [decayed("epoch", Clock(k * 7, 84, 7)) for k in range(12)]
    assert epochs == pytest.approx([1 - e / 12 for e in range(12)])
    assert epochs[-1] == pytest.approx(1 / 12)
    assert decayed("epoch", Clock(6, 84, 7)) == 1  # still the first epoch
    assert [decayed("iteration", Clock(k, 100, 7)) for k in (0, 25, 100, 120)] == [1, 0.75, 0, 0]
    half = [decayed("cosine", Clock(k * 7, 84, 7)) for k in (0, 6, 11)]
    assert half == pytest.approx([1, 0.5, 0.5 * math.cos(math.pi * 11 / 12) + 0.5])
    assert decayed("none", Clock(83, 84, 7)) == 1
    assert decayed("epoch", Clock(85, 86, 7)) == pytest.approx(1 / 13)  # the last epoch is not whole


def make(student, teacher, **settings):
    choice = Choice.parse(DistillationMethod, {"name": "task_adaptive", **settings})
    torch.manual_seed(0)
    return choice.cls(choice.config, student, teacher)


def batch_of(student, teacher, objects=True, iteration=0):
    images = torch.randint(0, 256, (2, 3, 96, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    boxes = [torch.tensor([[30.0, 20, 80, 60], [5, 5, 30, 30]]), torch.zeros(0, 4)]
    labels = [torch.tensor([3, 7]), torch.zeros(0, dtype=torch.int64)]
    targets = Targets(
        boxes if objects else boxes[1:] * 2, labels if objects else labels[1:] * 2, [(96, 128), (90, 128)]
    )
    torch.manual_seed(0)
    features = student.features(images)
    predictions = student.predict(features, targets)
    return DistillationBatch(images, targets, student, features, predictions, Clock(iteration, 10, 5), teacher)


@pytest.fixture
def two_stage(build, teacher_settings):
    """A student and a teacher with second stages, of unequal channels and weights."""
    student = build({**teacher_settings, "neck_channels": 24}).train()
    torch.manual_seed(1)
    return student, type(student).build(build(teacher_settings).config, 10).eval().requires_grad_(False)


@pytest.mark.parametrize("share", ["student", "teacher", "both"])
def test_two_second_stages_share_their_rois(two_stage, share):
    student, teacher = two_stage
    batch = batch_of(student, teacher)
    method = make(student, teacher, share=share)
    rows = method.judgements(batch)
    counts = {"student": 1, "teacher": 1, "both": 2}
    assert len(rows.student_MC) == len(rows.teacher_MC) == 32 * counts[share]
    torch.testing.assert_close(rows.student_MC.sum(1), torch.ones(len(rows.student_MC)))
    assert rows.student_MC.requires_grad
    assert not rows.teacher_MC.requires_grad
    on = rows.label_M > 0
    assert set(rows.label_M[on].tolist()) == {4, 8}  # the labels of the objects, after the background
    of_first = (rows.object_P4 == torch.tensor([30.0, 20, 80, 60])).all(1)
    assert torch.equal(rows.label_M[on], torch.where(of_first, 4, 8))  # each set keeps the labels it was sampled with
    assert (paired_iou(rows.start_P4, rows.object_P4) >= 0.5).all()
    losses = method(batch)
    assert set(losses) == {"feature", "cls", "box"}
    sum(losses.values()).backward()
    assert student.roi_heads.box_predictor.cls_score.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in teacher.parameters())


def test_one_box_for_all_classes_is_read_where_a_head_gives_no_more(places):
    start, truth = places
    wanted = CODER.encode_single(truth, start)
    rois = RoIs(start, *[torch.zeros(3).long()] * 3, truth)
    logits, given = torch.zeros(3, 2).double(), torch.zeros(3, 2, 4).double()
    rows = judged_rois(
        RoIActivations((), logits, given), RoIActivations((), logits, wanted[:, None]), rois, CODER, [(500, 500)]
    )
    torch.testing.assert_close(rows.teacher_boxes_P4, truth)


def test_labels_travel_with_their_own_rois():
    sets = [
        RoIs(
            torch.full((2, 4), k), torch.tensor([0, 1]), torch.tensor([k, k]), torch.tensor([k, -1]), torch.zeros(2, 4)
        )
        for k in (1, 2)
    ]
    both = joined(*sets)
    assert both.labels_M.tolist() == [1, -1, 2, -1]
    assert both.boxes_M4[:, 0].tolist() == [1, 1, 2, 2]
    assert both.image_M.tolist() == [0, 1, 0, 1]


def test_what_the_student_said_is_read_and_not_computed_again(two_stage):
    student, teacher = two_stage
    batch = batch_of(student, teacher)
    rows = make(student, teacher).judgements(batch)
    assert torch.equal(rows.student_MC, batch.predictions.activations.logits.softmax(1))


def test_a_student_like_its_teacher_has_no_feature_or_box_loss(build, teacher_settings):
    """Class losses are not asked for: RoIAlign with and without gradient differ in the last bit, which a strict > sees."""
    student, teacher = build(teacher_settings).eval(), build(teacher_settings).eval().requires_grad_(False)
    method = make(student, teacher, box_gate="beats_student", adapters="needed")
    losses = method(batch_of(student, teacher))
    assert losses["feature"].item() == 0
    assert losses["box"].item() < 1e-9


def test_all_terms_decay_to_nothing(two_stage):
    student, teacher = two_stage
    method = make(student, teacher, decay="iteration", regression=2)
    full, half, none = (
        {k: v.item() for k, v in method(batch_of(student, teacher, iteration=at)).items()} for at in (0, 5, 10)
    )
    assert half == pytest.approx({name: value / 2 for name, value in full.items()})
    assert set(none.values()) == {0}


def test_without_objects_everything_is_finite(two_stage):
    student, teacher = two_stage
    for share in ("student", "both"):
        losses = make(student, teacher, share=share)(batch_of(student, teacher, objects=False))
        assert losses["feature"].item() == 0
        assert losses["box"].item() == 0
        sum(losses.values()).backward()
        assert all(loss.isfinite() for loss in losses.values())
        assert all(p.grad is None or p.grad.isfinite().all() for p in student.parameters())


@pytest.fixture
def dense(build, student_settings):
    student = build({**student_settings, "neck_channels": 24}).train()
    torch.manual_seed(1)
    return student, type(student).build(build(student_settings).config, 10).eval().requires_grad_(False)


def test_dense_heads_are_judged_at_the_anchors_on_objects(dense):
    student, teacher = dense
    batch = batch_of(student, teacher)
    rows = judged_anchors(batch.predictions, batch.teacher_predictions, batch.targets)
    assert set(rows.label_M.tolist()) == {3, 7}
    wanted = student.coder.decode_single(rows.student_deltas_P4, rows.start_P4)
    inside = (wanted >= 0).all(1) & (wanted <= torch.tensor([128, 96, 128, 96])).all(1)
    torch.testing.assert_close(rows.student_boxes_P4[inside], wanted[inside])
    assert inside.any()
    losses = make(student, teacher)(batch)
    assert set(losses) == {"feature", "cls", "box"}
    sum(losses.values()).backward()
    assert student.head.classification_head.cls_logits.weight.grad.abs().sum() > 0
    empty = batch_of(student, teacher, objects=False)
    losses = make(student, teacher)(empty)
    assert {loss.item() for loss in losses.values()} == {0}


def test_a_box_marks_all_levels_or_its_own(dense):
    student, teacher = dense
    boxes = torch.tensor([[0.0, 0, 20, 20], [0, 0, 128, 120], [0, 0, 240, 240]])
    every, own = make(student, teacher), make(student, teacher, levels="own")
    assert [every.marks(boxes, level).tolist() for level in range(4)] == [[True] * 3] * 4
    assert [own.marks(boxes, level).tolist() for level in (0, 1)] == [[True, True, False], [False, False, True]]


def test_the_feature_loss_is_the_sum_over_levels_of_equal_stride(build, student_settings, teacher_settings):
    """Strides 8 to 64 and 4 to 32 share 8, 16 and 32."""
    student, teacher = build(student_settings).train(), build(teacher_settings).eval().requires_grad_(False)
    assert all(isinstance(f, torch.nn.Conv2d) for f in make(student, teacher, classification=0, regression=0).adapters)
    method = make(student, teacher, classification=0, regression=0, feature=2, adapters="needed")
    assert method.pairs == [(0, 1), (1, 2), (2, 3)]
    batch = batch_of(student, teacher)
    wanted = 0.0
    for s, t in method.pairs:
        theirs, stride = batch.teacher_features.levels[t], student.strides[s]
        masks = np.stack([mask_by_numpy(boxes.tolist(), theirs.shape[-2:], stride) for boxes in batch.targets.boxes])
        for image, boxes in enumerate(batch.targets.boxes):
            for b in boxes.tolist():
                if mask_by_numpy([b], theirs.shape[-2:], stride).sum() == 0:
                    masks[image, int((b[1] + b[3]) / 2 // stride), int((b[0] + b[2]) / 2 // stride)] = 1
        squared = (batch.features.levels[s] - theirs).detach().square().sum(1).numpy()
        wanted += 2 * (masks * squared).sum() / (2 * max(1, 16 * masks.sum()))
    losses = method(batch)
    assert set(losses) == {"feature"}
    assert losses["feature"].item() == pytest.approx(wanted, rel=1e-5)


def test_pairs_whose_heads_do_not_compare_are_refused_by_name(build, student_settings, teacher_settings):
    student, teacher = build(student_settings), build(teacher_settings)
    with pytest.raises(
        UserError, match=r"RetinaNet with strides \[8.*FasterRCNN with strides \[4, 8, 16, 32\], RoI heads"
    ):
        make(student, teacher)
    other = build({**student_settings, "aspect_ratios": [0.5, 2.0]})
    with pytest.raises(UserError, match=r"3 anchors a cell, the teacher .* 6 anchors a cell"):
        make(student, other)
    make(student, other, classification=0, regression=0)
    cascade = build(teacher_settings)
    cascade.second = build(teacher_settings).roi_heads
    with pytest.raises(UserError, match="heads cannot be compared"):
        make(build(teacher_settings), cascade)
    student.strides = (3, 5)
    with pytest.raises(UserError, match=r"task_adaptive: .*\[3, 5\]"):
        make(student, teacher, classification=0, regression=0)
    with pytest.raises(ConfigError, match="nothing is taught"):
        make(student, teacher, classification=0, regression=0, feature=0)


def test_two_stage_pair_learns(two_stage):
    """All three terms at once lower their own loss, and the teacher stays as it was."""
    student, teacher = two_stage
    before = [p.clone() for p in teacher.parameters()]
    task = DistillationTask(student, teacher, {"tadf": make(student, teacher, decay="none", class_loss="kl")}).train()
    optimizer = torch.optim.AdamW([p for group, _ in task.parameter_groups() for p in group], lr=1e-3)
    batch, totals = batch_of(student, teacher), []
    for _ in range(12):
        torch.manual_seed(0)
        losses = task(batch.images_BCHW, batch.targets, batch.clock)
        total = sum(loss for name, loss in losses.items() if name.startswith("tadf/"))
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert sum(totals[-3:]) < 0.9 * sum(totals[:3])
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters(), strict=True))
