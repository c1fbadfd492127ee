"""PKD against its authors' numbers, against Pearson's r by torch, and its invariances."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn import functional

from pipeline.config import Choice
from pipeline.errors import UserError
from stages.distillation.method import DistillationMethod
from stages.distillation.methods.pkd import pkd_loss, standardised

FILES = [
    "pkd_M2",
    "pkd_dead_channel_const3",
    "pkd_dead_channel_zero",
    "pkd_equal_corr_w6",
    "pkd_equal_w1",
    "pkd_four_levels_w6",
    "pkd_resize_half_w10",
    "pkd_resize_odd",
    "pkd_resize_teacher",
]


def of_file(numbers, settings):
    resize = "student" if settings["resize_stu"] else "teacher"
    students = [numbers[f"S{i}"].requires_grad_() for i in range(int(numbers["n_pairs"]))]
    losses = [pkd_loss(student, numbers[f"T{i}"], resize) for i, student in enumerate(students)]
    return settings["loss_weight"] * sum(losses), students


@pytest.mark.parametrize("name", FILES)
def test_equals_the_authors_code(reference, name):
    numbers, settings = reference(name)
    loss, students = of_file(numbers, settings)
    loss.backward()
    torch.testing.assert_close(loss, numbers["loss"], rtol=1e-9, atol=1e-12)
    for i, student in enumerate(students):
        torch.testing.assert_close(student.grad, numbers[f"grad_S{i}"], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("name", "tolerance"), [("pkd_equal_f32", 1e-5), ("pkd_offset1e4_f32", 1e-4)])
def test_equals_the_authors_code_in_single_precision(reference, name, tolerance):
    numbers, settings = reference(name)
    loss, students = of_file(numbers, settings)
    loss.backward()
    torch.testing.assert_close(loss, numbers["loss"].float(), rtol=tolerance, atol=tolerance)
    if name == "pkd_equal_f32":
        torch.testing.assert_close(students[0].grad, numbers["grad_S0"], rtol=1e-5, atol=1e-7)


def test_one_value_a_channel_is_nothing_where_the_authors_code_gives_nan(reference):
    numbers, settings = reference("pkd_M1_nan")
    loss, students = of_file(numbers, settings)
    loss.backward()
    assert numbers["loss"].isnan()
    assert loss.item() == 0
    assert students[0].grad.abs().max() == 0


@pytest.fixture
def pair():
    number = torch.arange(240).double().view(2, 4, 5, 6)
    return torch.sin(number * 0.7) + 0.01 * number, torch.cos(number * 1.3) + torch.sin(number * 0.69)


def test_golden_number(pair):
    assert pkd_loss(*pair).item() == pytest.approx(0.8269093021118754, rel=1e-9)  # by numpy, from the equation


def test_is_one_minus_pearsons_r(pair):
    student, teacher = pair
    rows = [(s.flatten(), t.flatten()) for s, t in zip(student.transpose(0, 1), teacher.transpose(0, 1), strict=True)]
    correlations = torch.stack([torch.corrcoef(torch.stack(row))[0, 1] for row in rows])
    count = student.shape[0] * student.shape[2] * student.shape[3]
    wanted = (count - 1) / count * (1 - correlations).mean()
    assert pkd_loss(student, teacher).item() == pytest.approx(wanted.item(), abs=1e-5)


def test_ignores_scale_and_shift_and_channel_order(pair):
    student, teacher = pair
    scale, shift = (
        torch.tensor([0.5, 2.0, 7.0, 1.0]).view(1, 4, 1, 1),
        torch.tensor([3.0, -1.0, 0.0, 9.0]).view(1, 4, 1, 1),
    )
    assert pkd_loss(student * scale + shift, teacher).item() == pytest.approx(
        pkd_loss(student, teacher).item(), abs=1e-5
    )
    order = torch.tensor([2, 0, 3, 1])
    assert pkd_loss(student[:, order], teacher[:, order]).item() == pytest.approx(pkd_loss(student, teacher).item())
    assert pkd_loss(student[:, order], teacher).item() != pytest.approx(pkd_loss(student, teacher).item())


def test_extremes(pair):
    student, _ = pair
    count = student.shape[0] * student.shape[2] * student.shape[3]
    assert pkd_loss(student, student).item() == 0
    assert pkd_loss(student, -student).item() == pytest.approx(2 * (count - 1) / count, abs=1e-5)


def test_gradient_is_that_of_finite_differences(pair):
    student, teacher = (tensor[:, :2, :3, :3].clone() for tensor in pair)
    assert torch.autograd.gradcheck(lambda s: pkd_loss(s, teacher), student.requires_grad_())


def test_resizes_before_the_statistics(pair):
    student, teacher = pair
    large = functional.interpolate(teacher, (9, 11), mode="bilinear")
    by_hand = functional.interpolate(student, (9, 11), mode="bilinear")
    assert pkd_loss(student, large).item() == pytest.approx(pkd_loss(by_hand, large).item())


def test_a_difference_in_width_alone_is_resized_too(pair):
    student, teacher = pair
    wide = functional.interpolate(teacher, (5, 11), mode="bilinear")
    assert torch.isfinite(pkd_loss(student, wide))


def test_no_gradient_for_the_teacher(pair):
    student, teacher = pair
    teacher.requires_grad_()
    pkd_loss(student.requires_grad_(), teacher).backward()
    assert teacher.grad is None
    assert student.grad is not None


def test_is_symmetric_and_blind_to_the_order_of_positions_but_not_to_the_scale_of_an_image(pair):
    student, teacher = pair
    loss = pkd_loss(student, teacher).item()
    assert pkd_loss(teacher, student).item() == pytest.approx(loss, rel=1e-12)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))

    def shuffled(maps):
        return maps.transpose(0, 1).flatten(1)[:, order].view(4, 2, 5, 6).transpose(0, 1)

    assert pkd_loss(shuffled(student), shuffled(teacher)).item() == pytest.approx(loss, rel=1e-12)
    image = torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)
    assert pkd_loss(student * image, teacher).item() != pytest.approx(loss, rel=1e-3)


def test_the_gradient_is_that_of_the_equation_without_mean_and_without_radial_part(pair):
    """weight / (C M sigma) (r s' - t'): sums to 0, orthogonal to the student, inverse to its scale."""
    student, teacher = pair
    gradients = {}
    for scale in (1.0, 10.0):
        scaled = (student * scale).requires_grad_()
        pkd_loss(scaled, teacher).backward()
        gradients[scale] = scaled.grad
        rows, points = scaled.grad.transpose(0, 1).flatten(1), scaled.detach().transpose(0, 1).flatten(1)
        assert rows.sum(1).abs().max() < 1e-12
        assert (rows * points).sum(1).abs().max() < 1e-6
    torch.testing.assert_close(gradients[10.0] * 10, gradients[1.0], rtol=1e-3, atol=1e-8)
    s, t = (m.transpose(0, 1).flatten(1).numpy() for m in (student, teacher))
    s_sigma = s.std(1, ddof=1, keepdims=True)
    s_std, t_std = (
        (s - s.mean(1, keepdims=True)) / s_sigma,
        (t - t.mean(1, keepdims=True)) / t.std(1, ddof=1, keepdims=True),
    )
    r = np.array([np.corrcoef(a, b)[0, 1] for a, b in zip(s, t, strict=True)])[:, None]
    wanted = (r * s_std - t_std) / (4 * 60 * s_sigma)
    np.testing.assert_allclose(gradients[1.0].transpose(0, 1).flatten(1).numpy(), wanted, rtol=1e-4, atol=1e-8)


def test_a_large_offset_is_stable_in_single_precision(pair):
    student, teacher = pair
    assert pkd_loss((student + 1e4).float(), teacher.float()).item() == pytest.approx(
        pkd_loss(student, teacher).item(), abs=2e-4
    )


def dead(student):
    """The same with one channel that hardly varies."""
    result = student.clone()
    result[:, 1] = 3 + 1e-9 * student[:, 1]
    return result.requires_grad_()


def test_a_dead_channel_is_a_spike_without_a_floor_and_bounded_with_one(pair):
    """The bound: an element's gradient is 1 / (C M floor) times the difference of two standardised values."""
    student, teacher = pair
    spike, bounded = dead(student), dead(student)
    pkd_loss(spike, teacher).backward()
    loss = pkd_loss(bounded, teacher, floor=1e-3)
    loss.backward()
    assert spike.grad[:, 1].abs().max() > 1e3
    assert 0 < bounded.grad[:, 1].abs().max() <= 2 * standardised(teacher).abs().max() / (4 * 60 * 1e-3)
    torch.testing.assert_close(bounded.grad[:, [0, 2, 3]], spike.grad[:, [0, 2, 3]])
    assert loss.item() == pytest.approx(pkd_loss(spike, teacher).item(), abs=1e-3)


def test_a_constant_channel_counts_half_and_the_floor_changes_no_live_channel(pair):
    student, teacher = pair
    assert pkd_loss(student, teacher, floor=1e-3).item() == pkd_loss(student, teacher).item()
    constant = torch.full_like(student, 3.0)
    assert pkd_loss(constant, teacher, floor=1e-3).item() == pytest.approx(0.5 * 59 / 60, abs=1e-5)


def test_gradient_at_the_floor_is_that_of_finite_differences(pair):
    student, teacher = (tensor[:, :2, :3, :3].clone() for tensor in pair)
    student[:, 1] *= 1e-2
    assert torch.autograd.gradcheck(lambda s: pkd_loss(s, teacher, floor=0.1), student.requires_grad_())


@pytest.mark.parametrize("shape", [(1, 4, 1, 1), (1, 4, 1, 2), (2, 4, 1, 1)])
def test_few_values_are_finite(shape):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(shape, generator=generator) for _ in range(2))
    loss = pkd_loss(student.requires_grad_(), teacher, floor=1e-3)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()
    assert (loss.item() == 0) == (shape[0] * shape[2] * shape[3] == 1)


OF_A_PROCESS = """
import sys
from datetime import timedelta
import torch
from torch import distributed
from stages.distillation.methods.pkd import pkd_loss, summed

torch.set_num_threads(1)
folder, rank = sys.argv[1], int(sys.argv[2])
student, teacher = torch.load(f"{folder}/maps{rank}.pt", weights_only=True)
group = f"file://{folder}/group"
distributed.init_process_group("gloo", init_method=group, rank=rank, world_size=2, timeout=timedelta(seconds=60))
mine = student.requires_grad_()
loss = pkd_loss(mine, teacher, floor=1e-3, over_processes=True)
loss.backward()
torch.save((summed(torch.ones(1)), loss.detach(), mine.grad), f"{folder}/found{rank}.pt")
distributed.destroy_process_group()
"""


def test_statistics_over_processes_are_those_of_the_whole_batch(tmp_path):
    """Value and gradient of two processes with two images and one, averaged as DDP does, equal those of one process with
    all three; a dead channel among them."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn((3, 4, 3, 5), generator=generator, dtype=torch.float64) for _ in range(2))
    student[:, 1] = 2.0
    whole = student.clone().requires_grad_()
    wanted = pkd_loss(whole, teacher, floor=1e-3)
    wanted.backward()
    shares = [(student[:2], teacher[:2]), (student[2:], teacher[2:])]
    started = []
    for rank, share in enumerate(shares):
        torch.save(tuple(part.clone() for part in share), tmp_path / f"maps{rank}.pt")
        started.append(subprocess.Popen([sys.executable, "-c", OF_A_PROCESS, str(tmp_path), str(rank)]))
    assert [process.wait(120) for process in started] == [0, 0]
    rows = [torch.load(tmp_path / f"found{rank}.pt", weights_only=True) for rank in range(2)]
    assert [ones.item() for ones, _, _ in rows] == [2, 2]
    assert sum(loss.item() for _, loss, _ in rows) / 2 == pytest.approx(wanted.item(), rel=1e-12)
    gradient = torch.cat([each for *_, each in rows]) / 2
    torch.testing.assert_close(gradient, whole.grad, rtol=1e-9, atol=1e-14)


def make(build, student, teacher, **settings):
    choice = Choice.parse(DistillationMethod, {"name": "pkd", **settings})
    return choice.cls(choice.config, build(student), build(teacher))


def test_the_default_floor_lies_far_below_the_channels_of_a_new_neck(build, student_settings, teacher_settings):
    images = torch.randint(0, 256, (2, 3, 128, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    floor = make(build, student_settings, teacher_settings).config.floor
    for settings in (student_settings, teacher_settings):
        with torch.no_grad():
            levels = build(settings).train().features(images).levels
        assert min(level.transpose(0, 1).flatten(1).std(1).min() for level in levels) > 30 * floor > 0


def test_pairs_by_index_as_published_or_by_stride(build, student_settings, teacher_settings):
    """The student has strides 8 to 64, the teacher 4 to 32."""
    assert make(build, student_settings, teacher_settings).pairs == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert make(build, student_settings, teacher_settings, levels=2).pairs == [(0, 0), (1, 1)]
    assert make(build, student_settings, teacher_settings, pairing="stride").pairs == [(0, 1), (1, 2), (2, 3)]


def test_levels_that_share_no_stride_are_refused_by_name(build, student_settings, teacher_settings):
    student, teacher = build(student_settings), build(teacher_settings)
    student.strides = (3, 5, 7, 9)
    choice = Choice.parse(DistillationMethod, {"name": "pkd", "pairing": "stride"})
    with pytest.raises(UserError, match=r"pkd: .*\[3, 5, 7, 9\].*\[4, 8, 16, 32\]"):
        choice.cls(choice.config, student, teacher)


def test_the_method_is_the_weighted_sum_of_its_pairs(build, student_settings, teacher_settings):
    from stages.detection.records import Features, Targets
    from stages.distillation.method import DistillationBatch
    from stages.training.clock import Clock

    method = make(build, student_settings, teacher_settings, weight=3, pairing="stride", floor=0)
    generator = torch.Generator().manual_seed(0)

    def maps(sides):
        levels = tuple(torch.randn((2, 16, side, side), generator=generator) for side in sides)
        return Features((), levels, (64, 64))

    mine, theirs = maps((8, 4, 2, 1)), maps((16, 8, 4, 2))
    batch = DistillationBatch(None, Targets([], [], []), None, mine, None, Clock(0, 1, 1))
    batch.teacher_features = theirs  # in the place of what a teacher would compute
    wanted = 3 * sum(pkd_loss(mine.levels[k], theirs.levels[k + 1]) for k in range(3))
    torch.testing.assert_close(method(batch)["feature"], wanted)
