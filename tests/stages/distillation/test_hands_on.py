"""HGD-style guidance against its equations in numpy, and by its invariants. There is no published number to meet."""

import math

import numpy as np
import pytest
import torch

from pipeline.config import Choice
from pipeline.errors import UserError
from stages.detection.records import Features, Targets
from stages.distillation.method import DistillationBatch, DistillationMethod
from stages.distillation.methods.hands_on import imitation_error, macro_weights, micro_weights, nearest_pairs
from stages.distillation.task import DistillationTask
from stages.training.clock import Clock


@pytest.fixture
def maps():
    """Two double maps (2, 5, 4, 6), student's and teacher's."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn((2, 5, 4, 6), generator=generator, dtype=torch.float64) for _ in range(2))


def by_numpy(a, t, magnitude, temperature, hardness):
    """(e, w) of one image, from the equations; vectors are (positions, channels)."""
    length_a, length_t = np.linalg.norm(a, axis=1), np.linalg.norm(t, axis=1)
    cosine = (a * t).sum(1) / (length_a * length_t)
    e = 1 - cosine + magnitude * ((length_a - length_t) / (length_t.mean() + 1e-6)) ** 2
    apart = ((a / length_a[:, None] - t / length_t[:, None]) ** 2).sum(1)
    active = np.abs(t).mean(1)
    z = (active / active.mean() + hardness * apart / apart.mean()) / temperature
    w = np.exp(z - z.max())
    return e, len(w) * w / w.sum()


def test_errors_and_micro_weights_are_those_of_the_equations(maps):
    student, teacher = maps
    error, direction = imitation_error(student, teacher, 0.5)
    weights = micro_weights(teacher, direction, 0.7, 1.3)
    for image in (0, 1):
        a, t = (m[image].flatten(1).T.numpy() for m in maps)
        e, w = by_numpy(a, t, 0.5, 0.7, 1.3)
        np.testing.assert_allclose(error[image].flatten(), e, rtol=1e-9)
        np.testing.assert_allclose(weights[image].flatten(), w, rtol=1e-9)


def test_golden_numbers():
    """Two positions: a = (3, 4), (0, 1); t = (4, 3), (0, -1). |a| = 5, 1; |t| = 5, 1; cos = .96, -1."""
    student = torch.tensor([[3.0, 0], [4, 1]]).view(1, 2, 1, 2).double()
    teacher = torch.tensor([[4.0, 0], [3, -1]]).view(1, 2, 1, 2).double()
    error, direction = imitation_error(student, teacher, 0.5)
    assert error.flatten().tolist() == pytest.approx([0.04, 2.0])  # the second is opposite and as long
    longer, _ = imitation_error(2 * student, teacher, 0.5)  # (10 - 5) / 3 and (2 - 1) / 3, squared and halved
    assert (longer - error).flatten().tolist() == pytest.approx([25 / 18, 1 / 18], rel=1e-5)
    weights = micro_weights(teacher, direction, 1.0, 1.0)  # activations 3.5 and .5, mean 2; errors' mean 1.02
    scores = [3.5 / 2 + 0.04 / 1.02, 0.5 / 2 + 2 / 1.02]
    wanted = [2 * math.exp(s) / sum(math.exp(x) for x in scores) for s in scores]
    assert weights.flatten().tolist() == pytest.approx(wanted)
    relative = [1 / 2, 3 / 2]
    wanted = [2 * math.exp(s) / sum(math.exp(x) for x in relative) for s in relative]
    assert macro_weights(torch.tensor([1.0, 3.0]), 1.0).tolist() == pytest.approx(wanted)


def test_equal_maps_have_no_error_at_all(maps):
    error, direction = imitation_error(maps[0], maps[0].clone(), 0.5, floor=0.01)
    assert error.abs().max() == 0
    assert direction.abs().max() == 0


def test_weights_are_not_negative_and_have_mean_one(maps):
    weights = micro_weights(maps[1], imitation_error(*maps, 0.5)[1], 0.5, 1.0)
    assert weights.min() >= 0
    torch.testing.assert_close(weights.mean((1, 2)), torch.ones(2).double())
    omega = macro_weights(torch.tensor([0.1, 3.0, 0.0, 7.0]), 1.0)
    assert omega.min() >= 0
    assert omega.sum().item() == pytest.approx(4)


def test_weights_of_a_position_ignore_a_common_scale(maps):
    student, teacher = maps
    plain = micro_weights(teacher, imitation_error(student, teacher, 0.5)[1], 0.5, 1.0)
    scaled = micro_weights(7 * teacher, imitation_error(7 * student, 7 * teacher, 0.5)[1], 0.5, 1.0)
    torch.testing.assert_close(scaled, plain, rtol=1e-5, atol=1e-6)


def test_high_temperatures_and_equal_losses_weigh_equally(maps):
    direction = imitation_error(*maps, 0.5)[1]
    torch.testing.assert_close(micro_weights(maps[1], direction, 1e9, 1.0), torch.ones(2, 4, 6).double())
    torch.testing.assert_close(macro_weights(torch.tensor([1.0, 9.0, 4.0]), 1e9), torch.ones(3))
    torch.testing.assert_close(macro_weights(torch.full((3,), 0.2), 1.0), torch.ones(3))
    torch.testing.assert_close(macro_weights(torch.zeros(3), 1.0), torch.ones(3))


def test_what_lags_counts_more():
    weights = macro_weights(torch.tensor([1.0, 2.0, 5.0]), 1.0)
    assert weights[0] < weights[1] < weights[2]


def test_direction_ignores_the_length_of_each_vector(maps):
    student, teacher = maps
    scale = torch.rand((2, 1, 4, 6), generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.5
    torch.testing.assert_close(imitation_error(student * scale, teacher, 0.5)[1], imitation_error(*maps, 0.5)[1])


def test_zero_vectors_are_finite_and_the_floor_bounds_their_gradient(maps):
    student, teacher = maps
    student, teacher = student.clone(), teacher.clone()
    student[:, :, 0], teacher[:, :, :, 0] = 0, 0
    largest = {}
    for floor in (0.0, 0.01):
        given = student.clone().requires_grad_()
        error, direction = imitation_error(given, teacher, 0.5, floor)
        (error * micro_weights(teacher, direction, 0.5, 1.0)).mean().backward()
        assert error.isfinite().all()
        largest[floor] = given.grad.abs().max().item()
    # At a = 0 the gradient is that of |t / |t| - a / least|^2 / 2, with w <= H W in the mean over B H W positions.
    assert largest[0.01] <= 1 / (0.01 * torch.linalg.vector_norm(teacher, dim=1).mean((1, 2)).min()) / 2
    assert math.isfinite(largest[0.0])
    assert largest[0.0] > 100 * largest[0.01]
    nothing = torch.zeros(1, 3, 1, 1, requires_grad=True)
    error, direction = imitation_error(nothing, torch.zeros(1, 3, 1, 1), 0.5)
    error.sum().backward()
    assert error.item() == 0
    assert nothing.grad.abs().max() == 0
    assert micro_weights(torch.zeros(1, 3, 1, 1), direction, 0.5, 1.0).item() == 1


def test_gradient_with_frozen_weights_is_that_of_finite_differences(maps):
    student, teacher = (m[:, :3, :2, :2].clone() for m in maps)
    weights = micro_weights(teacher, imitation_error(student, teacher, 0.5)[1], 0.5, 1.0)
    assert torch.autograd.gradcheck(
        lambda s: (weights * imitation_error(s, teacher, 0.5, 0.01)[0]).mean(), student.requires_grad_()
    )
    assert not weights.requires_grad


def test_no_gradient_through_the_weights_or_to_the_teacher(maps):
    student, teacher = (m.clone().requires_grad_() for m in maps)
    error, direction = imitation_error(student, teacher, 0.5)
    weights = micro_weights(teacher, direction, 0.5, 1.0)
    (error * weights).mean().backward()
    again = maps[0].clone().requires_grad_()
    (imitation_error(again, teacher, 0.5)[0] * weights.clone()).mean().backward()
    assert torch.equal(student.grad, again.grad)
    assert teacher.grad is None


@pytest.mark.parametrize(
    ("student", "teacher", "pairs"),
    [
        ((4, 8, 16, 32), (4, 8, 16, 32), [(0, 0), (1, 1), (2, 2), (3, 3)]),
        ((8, 16, 32, 64, 128), (4, 8, 16, 32), [(0, 1), (1, 2), (2, 3), (3, 3), (4, 3)]),
        ((8, 16), (4, 16, 64), [(0, 0), (1, 1)]),  # 8 is as far from 4 as from 16: the finer
    ],
)
def test_maps_are_paired_by_the_nearest_stride(student, teacher, pairs):
    assert nearest_pairs(student, teacher) == pairs


def make(student, teacher, **settings):
    choice = Choice.parse(DistillationMethod, {"name": "hands_on", "warmup": 0, **settings})
    torch.manual_seed(0)
    return choice.cls(choice.config, student, teacher)


@pytest.fixture
def pair(build, student_settings, teacher_settings):
    return build({**student_settings, "neck_channels": 24}), build(teacher_settings).eval().requires_grad_(False)


def batch_of(student, teacher, iteration=5):
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    targets = Targets([torch.tensor([[8.0, 8, 40, 40]])] * 2, [torch.tensor([1])] * 2, [(64, 64)] * 2)
    features = student.features(images)
    clock = Clock(iteration, 100, 10)
    return DistillationBatch(images, targets, student, features, None, clock, teacher)


def test_all_stages_of_backbone_and_neck_learn(pair):
    """Strides 4-32 of both backbones; a neck of 8-64 beside one of 4-32, at whose strides 64 finds 32 the nearest."""
    student, teacher = pair
    assert all(isinstance(f, torch.nn.Conv2d) for f in make(student, teacher).adapters)
    method = make(student, teacher, adapters="needed")
    assert method.backbone == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert method.neck == [(0, 1), (1, 2), (2, 3), (3, 3)]
    shapes = [tuple(f.weight.shape[:2]) if isinstance(f, torch.nn.Conv2d) else None for f in method.adapters]
    assert shapes == [None] * 4 + [(16, 24)] * 4  # channels differ in the necks alone
    batch = batch_of(student, teacher)
    assert all(mine.shape == theirs.shape for mine, theirs in method.pairs(batch))
    losses = method(batch)
    losses["backbone"].backward(retain_graph=True)
    assert all(f.weight.grad.abs().sum() == 0 for f in method.adapters[4:])
    assert any(p.grad is not None for p in student.backbone.body.parameters())
    losses["neck"].backward()
    assert all(f.weight.grad.abs().sum() > 0 for f in method.adapters[4:])
    assert all(p.grad is None for p in teacher.parameters())


def test_frozen_and_finer_stages_are_left_out(build, pair):
    student, teacher = pair
    assert make(student, teacher, finest_stride=8).backbone == [(1, 1), (2, 2), (3, 3)]
    settings = {"name": "retinanet", "backbone": "tiny", "neck_channels": 16, "extra_levels": 1}
    frozen = build({**settings, "trainable_layers": 3})
    assert make(frozen, teacher).backbone == [(1, 1), (2, 2), (3, 3)]
    assert all(p.device.type == "cpu" for p in frozen.parameters())
    with pytest.raises(UserError, match=r"hands_on: no map is left.*\[8, 16, 32\].*finest_stride is 999"):
        make(frozen, teacher, finest_stride=999)


def test_equal_weighting_is_plain_imitation_of_all_stages(pair):
    student, teacher = pair
    method, batch = make(student, teacher, weighting="equal"), batch_of(*pair)
    plain = torch.stack([imitation_error(a, t, 0.5, 0.01)[0].mean() for a, t in method.pairs(batch)]).mean()
    torch.testing.assert_close(sum(method(batch).values()), plain)
    hot = make(student, teacher, micro_temperature=1e9, macro_temperature=1e9)
    torch.testing.assert_close(sum(hot(batch).values()), plain, rtol=1e-5, atol=1e-6)
    both = make(student, teacher)
    assert sum(both(batch).values()).item() != pytest.approx(plain.item(), rel=1e-3)


def test_on_its_own_features_with_identity_adapters_the_loss_is_zero(build, teacher_settings):
    student, teacher = build(teacher_settings).eval(), build(teacher_settings).eval()
    method = make(student, teacher, adapters="needed")
    assert all(isinstance(f, torch.nn.Identity) for f in method.adapters)
    assert [loss.item() for loss in method(batch_of(student, teacher)).values()] == [0, 0]


def test_macro_weights_follow_the_running_mean(pair):
    """Two steps by hand: average = .5 * average + .5 * loss; the weights of the second step read both."""
    student, teacher = pair
    method = make(student, teacher, weighting="macro", momentum=0.5)
    first, second = batch_of(student, teacher), batch_of(student, teacher)
    second.features = Features(
        tuple((k + 1) * f for k, f in enumerate(second.features.backbone)), second.features.levels, (64, 64)
    )
    losses = [
        torch.stack([imitation_error(a, t, 0.5, 0.01)[0].mean() for a, t in method.pairs(b)]).detach()
        for b in (first, second)
    ]
    method(first)
    found = sum(method(second).values())
    average = (0.25 * losses[0] + 0.5 * losses[1]).numpy()
    torch.testing.assert_close(method.average_K, torch.from_numpy(average))
    weights = np.exp(average / average.mean())
    weights = len(weights) * weights / weights.sum()
    assert found.item() == pytest.approx((weights * losses[1].numpy()).mean(), rel=1e-5)


def test_the_running_mean_is_saved_and_moves_in_training_only(pair):
    """What a resumed run needs is in the state; a measurement between steps changes nothing."""
    student, teacher = pair
    method, batch = make(student, teacher), batch_of(*pair)
    method(batch)
    state = {key: value.clone() for key, value in method.state_dict().items()}
    assert state["average_K"].min() > 0
    wanted = [loss.item() for loss in method(batch).values()]
    resumed = make(student, teacher)
    resumed.load_state_dict(state)
    assert [loss.item() for loss in resumed(batch).values()] == wanted
    before = resumed.average_K.clone()
    resumed.eval()(batch)
    assert torch.equal(resumed.average_K, before)


def test_the_weight_warms_up(pair):
    method = make(*pair, warmup=100, weight=2, weighting="equal")
    totals = [sum(method(batch_of(*pair, iteration=k)).values()).item() for k in (0, 50, 100, 1000)]
    assert totals[0] == 0
    assert totals[1:] == pytest.approx([totals[2] / 2, totals[2], totals[2]])


def test_one_image_of_one_cell_is_finite(pair):
    """The coarsest maps of a 32 pixel image have one cell."""
    student, teacher = pair
    student.eval()
    image = torch.full((1, 3, 32, 32), 99, dtype=torch.uint8)
    features = student.features(image)
    nothing = Targets([torch.zeros(0, 4)], [torch.zeros(0, dtype=torch.int64)], [(32, 32)])
    batch = DistillationBatch(image, nothing, student, features, None, Clock(5, 9, 9), teacher)
    total = sum(make(student, teacher)(batch).values())
    total.backward()
    assert total.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in student.parameters())


def test_the_plain_student_loads_from_what_is_kept(build, student_settings, pair):
    student, teacher = pair
    task = DistillationTask(student, teacher, {"guided": make(student, teacher)})
    kept = {k.removeprefix("student."): v for k, v in task.state_dict().items() if k.startswith("student.")}
    build({**student_settings, "neck_channels": 24}).load_state_dict(kept, strict=True)
    assert {k for k in task.state_dict() if "average_K" in k} == {"methods.guided.average_K"}
