"""A pair that a method cannot bridge is refused at plan time by the method's own constructor, with both's real shapes."""

import pytest
import torch

from pipeline.config import Choice
from pipeline.errors import UserError
from stages.detection.detector import Detector
from stages.distillation import fit
from stages.distillation.method import DistillationMethod, MethodConfig
from stages.training.optimizer import OptimizerConfig


class Picky(DistillationMethod):
    """Wants equal strides, as a real method might."""

    class Config(MethodConfig):
        reads_values: bool = False
        fails: bool = False

    def __init__(self, config, student, teacher):
        super().__init__(config, student, teacher)
        self.config = config
        assert all(parameter.is_meta for parameter in (*student.parameters(), *teacher.parameters()))
        if config.reads_values:
            next(student.parameters()).sum().item()
        if config.fails:
            torch.zeros(2) @ torch.zeros(3)
        if student.strides != teacher.strides:
            raise UserError(f"method picky: the student has strides {student.strides}, the teacher {teacher.strides}")

    def forward(self, batch):
        return {}


@pytest.fixture
def student(student_settings):
    return Choice.parse(Detector, student_settings)


@pytest.fixture
def teacher(teacher_settings):
    return Choice.parse(Detector, teacher_settings)


def picky(**settings):
    return {"p": Choice("picky", Picky, Picky.Config(**settings))}


def problems(student, methods, teachers):
    return list(fit.problems(student, methods, teachers, OptimizerConfig()))


def test_the_constructor_refuses_with_real_strides(student, teacher):
    assert problems(student, picky(), {"t": teacher}) == [
        "methods.p: the student has strides (8, 16, 32, 64), the teacher (4, 8, 16, 32)"
    ]
    assert problems(student, picky(), {"t": student}) == []


def test_each_method_is_tried_with_its_own_teacher(student, teacher):
    teachers = {"t": teacher, "u": student}
    assert problems(student, picky(teacher="u"), teachers) == []
    assert len(problems(student, picky(teacher="t"), teachers)) == 1
    (problem,) = problems(student, picky(), teachers)
    assert "several, t, u; say which" in problem


def test_a_teacher_that_is_not_known_yet_is_not_judged(student):
    assert problems(student, picky(), {"t": None}) == []


def test_a_method_that_reads_values_waits_for_them_and_a_bug_does_not(student, teacher):
    assert problems(student, picky(reads_values=True), {"t": teacher}) == []
    with pytest.raises(RuntimeError, match=r"size|shape"):
        problems(student, picky(fails=True), {"t": teacher})


def test_the_methods_that_are_there_are_built_without_memory(student, teacher):
    methods = {name: Choice.parse(DistillationMethod, name) for name in ("head", "pkd")}
    before = torch.random.get_rng_state()
    assert problems(student, methods, {"t": teacher}) == []
    assert torch.equal(before, torch.random.get_rng_state())
    (problem,) = problems(teacher, methods, {"t": student})
    assert problem.startswith("methods.head: it pairs a dense student with")
