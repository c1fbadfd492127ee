"""PKD against its authors' numbers, against Pearson's r by torch, and its invariances."""

import pytest
import torch
from torch.nn import functional

from stages.distillation.methods.pkd import pkd_loss

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


@pytest.mark.filterwarnings("ignore:std")
def test_one_value_a_channel_is_undefined_as_in_the_authors_code(reference):
    numbers, settings = reference("pkd_M1_nan")
    loss, _ = of_file(numbers, settings)
    assert loss.isnan()
    assert numbers["loss"].isnan()


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
