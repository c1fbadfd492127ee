"""Shares of the gradient: right by hand, of no influence on the training, and loud where a loss is dead or overbearing."""

import json

import pytest
import torch
from torch import nn

from pipeline.config import Choice
from stages.artifacts.checkpoint import GradientShare
from stages.detection.records import Features, Targets
from stages.distillation import gradients
from stages.distillation.gradients import GradientLog, gradient_norms, of_metrics, shares, table, warnings
from stages.distillation.method import DistillationMethod
from stages.distillation.task import DistillationTask
from stages.training.clock import Clock
from stages.training.loop import Trainer, TrainingConfig

SIZE = (96, 128)


@pytest.fixture
def features():
    """A stage of the backbone, and two levels made from it by one weight each."""
    stage = torch.tensor([[[[3.0, -4.0]]]], requires_grad=True) * 1.0
    return Features((stage,), (2.0 * stage, -1.0 * stage), (8, 16))


def test_norms_by_hand(features):
    (stage,), (fine, coarse) = features.backbone, features.levels
    losses = {
        "student/cls": fine.sum() + coarse.sum(),  # 1 at each of four numbers of the neck; 2 - 1 at each of the stage
        "student/box": -fine.sum(),
        "m/feature": 5 * coarse[..., 0].sum(),
        "m/stage": 0.5 * stage[..., 1].sum(),  # touches no level
        "m/dead": torch.zeros(()),
    }
    found = gradient_norms(losses, features)
    assert {name: round(value, 5) for name, value in found.items()} == {
        "gradient/neck/student/cls": 2.0,
        "gradient/backbone/student/cls": round(2**0.5, 5),
        "gradient/neck/student/box": round(2**0.5, 5),
        "gradient/backbone/student/box": round(8**0.5, 5),
        "gradient/neck/m/feature": 5.0,
        "gradient/backbone/m/feature": 5.0,
        "gradient/neck/m/stage": 0.0,
        "gradient/backbone/m/stage": 0.5,
        "gradient/neck/m/dead": 0.0,
        "gradient/backbone/m/dead": 0.0,
        "gradient/neck/student": round(2**0.5, 5),  # of the sum: at the fine level cls and box cancel
        "gradient/backbone/student": round(2**0.5, 5),
    }


def test_a_frozen_backbone_has_no_share():
    level = torch.ones(1, 1, 2, 2, requires_grad=True) * 1.0
    found = gradient_norms({"student/cls": level.sum()}, Features((torch.ones(1, 1, 4, 4),), (level,), (8, 8)))
    assert found["gradient/neck/student/cls"] == 2.0
    assert found["gradient/backbone/student/cls"] == 0.0


def rows(**norms):
    """One measurement of the neck and the backbone alike."""
    return [{f"gradient/{place}/{name}": value for name, value in norms.items() for place in ("neck", "backbone")}]


def test_shares_are_of_means_and_sum_to_one():
    first, second = rows(**{"student": 3.0, "student/cls": 1.0, "m/a": 0.0})[0], rows(
        **{"student": 3.0, "student/cls": 2.0, "m/a": 5.0}
    )[0]  # fmt: skip
    found = shares([first, second])
    assert found == [
        GradientShare(loss="student/cls", neck=1.5 / 4, backbone=1.5 / 4),
        GradientShare(loss="m/a", neck=2.5 / 4, backbone=2.5 / 4),
    ]
    assert table(found)[2].split() == ["m/a", "62.5%", "62.5%"]
    assert shares([]) == []


def test_dead_and_overbearing_losses_are_warned_of():
    norms = {"student": 1.0, "student/cls": 0.9, "student/box": 0.0, "m/dead": 0.0, "m/loud": 101.0, "m/strong": 99.0}
    dead_box, dead, loud = warnings(rows(**norms))
    assert dead_box.startswith("loss student/box gave the student no gradient in the first 50 steps: it is dead")
    assert dead.startswith("loss m/dead gave the student no gradient")
    assert loud.startswith("loss m/loud has 101 times the gradient of the detection losses together")
    at_the_backbone = [*rows(student=1.0), {"gradient/neck/m/stage": 0.0, "gradient/backbone/m/stage": 0.1}]
    assert warnings(at_the_backbone) == []  # a loss on the backbone is not dead because it passes the neck by


class Noisy(DistillationMethod):
    """Moves the neck, draws random numbers, has a buffer, and a term that never gives a gradient."""

    needs_teacher = False

    def __init__(self, config, student, teacher):
        super().__init__(config, student, teacher)
        self.config = config
        self.adapter = nn.Conv2d(student.channels[0], 4, 1)
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, batch):
        made = self.adapter(batch.features.levels[0])
        loss = (made + torch.rand_like(made)).square().mean()
        self.mean.lerp_(loss.detach(), 0.1)
        return {"noise": loss + 0 * self.mean, "nothing": torch.zeros(())}


@pytest.fixture
def train(build, student_settings, teacher_settings, tmp_path):
    """A function that trains a tiny student for some steps by methods of all kinds: final tensors, metrics."""

    def batches(first_step):
        while True:
            number = torch.Generator().manual_seed(first_step)
            images = torch.randint(0, 256, (2, 3, *SIZE), dtype=torch.uint8, generator=number)
            yield images, Targets([torch.tensor([[30.0, 20, 80, 60]])] * 2, [torch.tensor([3])] * 2, [SIZE] * 2)
            first_step += 1

    def run(name, steps):
        student, teacher = build(student_settings), build(teacher_settings)
        methods = {}
        for settings in ({"name": "head", "rois": 8, "proposals": 16, "warmup": 0}, {"name": "pkd"}):
            choice = Choice.parse(DistillationMethod, settings)
            methods[settings["name"]] = choice.cls(choice.config, student, teacher)
        methods["noisy"] = Noisy(Noisy.Config(), student, None)
        task = DistillationTask(student, teacher, methods)
        folder = tmp_path / name
        folder.mkdir()
        optimizer = {"name": "adamw", "lr": 1e-3, "warmup": 1, "clip": 10}
        Trainer(task, TrainingConfig(steps=steps, batch_size=2, device="cpu", optimizer=optimizer), 5, folder).fit(
            batches
        )
        return task.state_dict(), folder / "metrics.jsonl"

    return run


def test_measuring_does_not_change_the_training(train, monkeypatch):
    """Bit for bit, and not only in the losses."""
    measured, file = train("measured", 12)
    monkeypatch.setattr(gradients, "STEPS", ())
    plain, other = train("plain", 12)
    assert len(of_metrics(file)) == 2  # steps 1 and 10
    assert of_metrics(other) == []
    assert all(torch.equal(value, plain[name]) for name, value in measured.items())

    def losses(file):
        return [row for row in map(json.loads, file.read_text().splitlines()) if "lr" in row]

    assert losses(file) == losses(other)


def test_the_table_is_in_the_log_and_a_dead_loss_is_warned_of(train, caplog):
    caplog.set_level("INFO", "headstart")
    _, file = train("told", 3)
    found = {one.loss: one for one in shares(of_metrics(file))}
    assert set(found) == {"student/cls", "student/box", "head/assist_cls", "head/assist_box", "head/akd", "head/ckd"} | {
        "pkd/feature", "noisy/noise", "noisy/nothing"
    }  # fmt: skip
    assert sum(one.neck for one in found.values()) == pytest.approx(1)
    assert found["pkd/feature"].neck > 0
    assert found["pkd/feature"].backbone > 0
    assert "share of the gradient at the start" in caplog.text
    (warning,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert warning.startswith("loss noisy/nothing gave the student no gradient")


def test_nothing_is_measured_where_no_gradient_is_wanted(features):
    log = GradientLog()
    with torch.no_grad():
        log.measure({"student/cls": features.levels[0].sum()}, features, Clock(1, 100, 10))
    assert log.take() == {}
    log.measure({"student/cls": features.levels[0].sum()}, features, Clock(2, 100, 10))
    assert log.take() == {}
    log.measure({"student/cls": features.levels[0].sum()}, features, Clock(1, 100, 10))
    assert set(log.take()) == {
        f"gradient/{at}/{name}" for at in ("neck", "backbone") for name in ("student", "student/cls")
    }
    assert log.take() == {}
