"""Several teachers at once: each method reads its own, those with the same one share what it computed."""

import pytest
import torch

from pipeline.errors import PipelineError, UserError
from stages.artifacts.checkpoint import Teacher
from stages.detection.load import checksum
from stages.detection.records import Targets
from stages.distillation.method import DistillationMethod
from stages.distillation.task import DistillationTask
from stages.distillation.teachers import check_untouched, chosen
from stages.training.clock import Clock

SIZE = (96, 128)


def test_which_teacher_is_meant():
    assert chosen(None, True, ["a"]) == "a"
    assert chosen("b", True, ["a", "b"]) == "b"
    assert chosen("t", True, ["a", "t[seed=1]"]) == "t[seed=1]"
    assert chosen("t[seed=0]", True, ["t[seed=0]", "t[seed=1]"]) == "t[seed=0]"
    assert chosen(None, False, ["a", "b"]) is None
    assert chosen("a", False, ["a", "b"]) == "a"


@pytest.mark.parametrize(
    ("wanted", "names", "problem"),
    [
        (None, [], r"needs a teacher; wire one with needs: \{teacher: STAGE\}"),
        (None, ["a", "b"], "there are several, a, b; say which with teacher: NAME"),
        ("tall", ["tell", "b"], "tall is no teacher of this stage; did you mean 'tell'"),
        ("t", [], "t is no teacher of this stage; wire one"),
        ("t", ["t[seed=0]", "t[seed=1]"], r"t means several, t\[seed=0\], t\[seed=1\]; give the whole name"),
    ],
)
def test_what_is_not_clear_is_refused(wanted, names, problem):
    with pytest.raises(UserError, match=problem):
        chosen(wanted, True, names)


class Reading(DistillationMethod):
    """Keeps what it was shown, as no real method may, for the test to look at."""

    def __init__(self, config, student, teacher):
        super().__init__(config, student, teacher)
        self.config = config

    def forward(self, batch):
        object.__setattr__(self, "shown", (batch, batch.teacher, batch.teacher_features, batch.rois))
        return {"zero": batch.features.levels[0].sum() * 0}


@pytest.fixture
def taught(build, student_settings, teacher_settings):
    """A student, two different teachers, and a function that runs methods by their teachers' names."""
    student = build(student_settings)
    torch.manual_seed(1)
    teachers = {"large": build(teacher_settings), "small": build({**teacher_settings, "neck_channels": 24})}

    def run(**wanted):
        methods = {name: Reading(Reading.Config(teacher=one), student, teachers[one]) for name, one in wanted.items()}
        task = DistillationTask(student, teachers, methods)
        images = torch.randint(0, 256, (2, 3, *SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        box = torch.tensor([[30.0, 20, 80, 60]])
        task(images, Targets([box] * 2, [torch.tensor([3])] * 2, [SIZE] * 2), Clock(0, 10, 10))
        return {name: method.shown for name, method in methods.items()}

    return student, teachers, run


def test_each_method_reads_its_teacher_and_equals_share(taught, monkeypatch):
    _, teachers, run = taught
    asked = []
    for name, teacher in teachers.items():
        features = teacher.features
        monkeypatch.setattr(teacher, "features", lambda images, n=name, f=features: (asked.append(n), f(images))[1])
    shown = run(a="large", b="small", c="large")
    assert shown["a"][1] is teachers["large"]
    assert shown["b"][1] is teachers["small"]
    assert shown["a"][2] is shown["c"][2]
    assert shown["b"][2].levels[0].shape[1] == 24
    assert sorted(asked) == ["large", "small"]  # each once, however many learn from it
    assert shown["a"][0]._rois is shown["b"][0]._rois  # RoIs are the student's: one set for all


def test_several_teachers_and_a_method_that_names_none(taught):
    student, teachers, _ = taught
    with pytest.raises(UserError, match="several, large, small; say which"):
        DistillationTask(student, teachers, {"m": Reading(Reading.Config(), student, teachers["large"])})


def test_no_teacher_is_saved_or_trained(taught):
    student, teachers, _ = taught
    task = DistillationTask(student, teachers, {"m": Reading(Reading.Config(teacher="small"), student, None)})
    task.train()
    own = {id(parameter) for teacher in teachers.values() for parameter in teacher.parameters()}
    assert not own & {id(parameter) for parameter in task.parameters()}
    assert not any(teacher.training for teacher in teachers.values())
    assert not any(parameter.requires_grad for teacher in teachers.values() for parameter in teacher.parameters())


def test_a_teacher_that_changed_is_named(taught):
    _, teachers, _ = taught
    records = [Teacher(name=name, key=name, checksum=checksum(teacher)) for name, teacher in teachers.items()]
    check_untouched(records, teachers)
    with torch.no_grad():
        next(teachers["small"].parameters()).add_(1e-3)
    with pytest.raises(PipelineError, match="the weights of small changed while it taught"):
        check_untouched(records, teachers)
