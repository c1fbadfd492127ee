"""The loop: the same seed gives the same bits, also after a kill; a loss that is not finite is named."""

import errno
import itertools
import json
import os
import random
import signal
import time

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.errors import PipelineError, UserError
from stages.training.clock import Clock
from stages.training.loop import Trainer, TrainingConfig
from stages.training.optimizer import OptimizerConfig, milestones, rate


class Nothing:
    def to(self, device):
        return self


class Task(nn.Module):
    """A regression with batch normalisation and a random number in its loss, as RoI sampling has."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.student = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(1))
        self.student(torch.zeros(2, 3, 6, 6))
        self.clocks = []

    def parameter_groups(self):
        return [(list(self.student.parameters()), 1.0)]

    def observations(self):
        return {}

    def forward(self, images, targets, clock):
        self.clocks.append(clock)
        return {"fit": (self.student(images) - 1).square().mean() + torch.rand(()) * self.student(images).mean()}


def batches(first_step):
    for step in itertools.count(first_step):
        yield torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(step)), Nothing()


def config(**settings):
    return TrainingConfig(
        **{
            "steps": 12,
            "device": "cpu",
            "checkpoint_every": 4,
            "log_every": 3,  # does not divide checkpoint_every: a window may span a checkpoint
            "optimizer": {"name": "adamw", "lr": 0.01, "warmup": 3, "schedule": "cosine", "clip": 1.0},
            **settings,
        }
    )


def state(trainer):
    return {key: value.clone() for key, value in trainer.task.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


class Killed(Exception):
    pass


def killed_at(step):
    for number, batch in enumerate(batches(0)):
        if number == step:
            raise Killed
        yield batch


@pytest.mark.parametrize("ema", [None, 0.9])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_killed_run_ends_with_the_same_bits(tmp_path, ema, optimizer):
    settings = config(ema=ema, optimizer={"name": optimizer, "lr": 0.01, "warmup": 3, "schedule": "step"})
    whole = Trainer(Task(), settings, 5, tmp_path / "whole")
    (tmp_path / "whole").mkdir()
    whole.fit(batches)
    (tmp_path / "killed").mkdir()
    with pytest.raises(Killed):
        Trainer(Task(), settings, 5, tmp_path / "killed").fit(lambda first: killed_at(10))
    again = Trainer(Task(), settings, 5, tmp_path / "killed")
    fitted = again.fit(batches)
    assert same(state(whole), state(again))
    assert fitted.iterations == 12
    assert again.task.clocks[0].iteration == 8  # it went on from the checkpoint and did not begin anew

    def losses(folder):
        rows = [json.loads(line) for line in (tmp_path / folder / "metrics.jsonl").read_text().splitlines()]
        return [(row["step"], row["fit"]) for row in rows]

    assert losses("killed") == losses("whole")


def test_another_seed_gives_other_weights(tmp_path):
    runs = []
    for seed in (0, 1):
        directory = tmp_path / str(seed)
        directory.mkdir()
        trainer = Trainer(Task(), config(seed=seed), 5, directory)
        trainer.fit(batches)
        runs.append(state(trainer))
    assert not same(*runs)


def test_averaged_weights_are_kept(tmp_path):
    trained = {}
    for ema in (None, 0.5):
        directory = tmp_path / str(ema)
        directory.mkdir()
        trainer = Trainer(Task(), config(ema=ema), 5, directory)
        trainer.fit(batches)
        trained[ema] = state(trainer)
    assert not same(trained[None], trained[0.5])


def test_a_loss_that_is_not_finite_is_named(tmp_path):
    class Broken(Task):
        def forward(self, images, targets, clock):
            losses = super().forward(images, targets, clock)
            return {**losses, "head/akd": losses["fit"] * (float("nan") if clock.iteration == 3 else 1.0)}

    with pytest.raises(PipelineError, match=r"step 3: loss \{'head/akd': nan\}"):
        Trainer(Broken(), config(), 5, tmp_path).fit(batches)


def test_evaluation_while_training_is_logged(tmp_path):
    Trainer(Task(), config(validate_every=5), 5, tmp_path).fit(batches, lambda kept: {"val/ap": 0.25})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "val/ap" in row] == [5, 10, 12]


def test_waiting_for_batches_is_counted_apart(tmp_path):
    def slow(first):
        for batch in batches(first):
            time.sleep(0.02)
            yield batch

    fitted = Trainer(Task(), config(), 5, tmp_path).fit(slow)
    assert fitted.waited >= 12 * 0.02
    assert fitted.seconds > 0


def test_mixed_precision_trains(tmp_path):
    class Seen(Task):
        def forward(self, images, targets, clock):
            assert torch.is_autocast_enabled("cpu")
            return super().forward(images, targets, clock)

    assert Trainer(Seen(), config(precision="bf16"), 5, tmp_path).fit(batches).iterations == 12


def test_half_precision_on_a_cpu_is_refused_and_not_ignored(tmp_path):
    with pytest.raises(UserError, match="fp16 does not exist on a CPU; set precision: bf16"):
        Trainer(Task(), config(precision="fp16"), 5, tmp_path)


def test_a_gpu_that_is_not_there_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="cuda asked for"):
        Trainer(Task(), config(device="cuda"), 5, tmp_path)


def test_clock_counts_epochs_and_knows_the_milestones(tmp_path):
    task = Task()
    Trainer(task, config(optimizer={"schedule": "step", "warmup": 0}), 5, tmp_path).fit(batches)
    assert [clock.epoch for clock in task.clocks] == [0] * 5 + [1] * 5 + [2] * 2
    assert task.clocks[0] == Clock(0, 12, 5, (8, 11))


def test_rates():
    step = OptimizerConfig(lr=1.0, warmup=10, schedule="step")
    assert milestones(step, 120) == (80, 110)
    found = [rate(step, k, 120) for k in (0, 5, 10, 79, 80, 110)]
    assert found == pytest.approx([0.001, 0.5005, 1, 1, 0.1, 0.01])
    cosine = OptimizerConfig(lr=1.0, warmup=0, schedule="cosine")
    assert [rate(cosine, k, 100) for k in (0, 50, 100)] == pytest.approx([1, 0.5, 0])
    assert rate(OptimizerConfig(lr=1.0, warmup=0, schedule="constant"), 99, 100) == 1


def test_one_length():
    with pytest.raises(ValueError, match="either `steps` or `epochs`"):
        TrainingConfig()
    assert TrainingConfig(epochs=1.5).iterations(100) == 150


class Remembering(Task):
    """A task with what methods may have: a buffer that a forward pass moves, and random numbers of three kinds."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, images, targets, clock):
        losses = super().forward(images, targets, clock)
        self.seen.mul_(0.9).add_(losses["fit"].detach(), alpha=0.1)
        noise = random.random() + np.random.rand() + torch.rand(()).item()
        return {**losses, "method/own": (self.seen + 0.1 * noise) * self.student(images).square().mean()}


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def undisturbed(folder, **settings):
    """The state and the metrics of a run that nobody disturbed."""
    folder.mkdir()
    trainer = Trainer(Remembering(), config(ema=0.9, **settings), 5, folder)
    trainer.fit(batches, lambda kept: {"val/ap": 0.5})
    return state(trainer), metrics(folder)


def stopped_loading(step, folder, **changes):
    """A training that SIGTERM stops while it waits for the batch of this step."""

    def loading(first):
        for number, batch in enumerate(batches(first), first):
            if number == step:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    with pytest.raises(KeyboardInterrupt):
        Trainer(Remembering(), config(ema=0.9, **changes), 5, folder).fit(loading, lambda kept: {"val/ap": 0.5})


def continued(folder, **settings):
    """The same of a run that goes on, and the first step that it made."""
    trainer = Trainer(Remembering(), config(ema=0.9, **settings), 5, folder)
    trainer.fit(batches, lambda kept: {"val/ap": 0.5})
    first = trainer.task.clocks[0].iteration if trainer.task.clocks else None
    return state(trainer), metrics(folder), first


def assert_same(again, whole):
    assert same(again[0], whole[0])
    assert again[1] == whole[1]


def test_buffers_and_all_random_numbers_are_those_of_the_step(tmp_path):
    whole = undisturbed(tmp_path / "whole")
    (tmp_path / "killed").mkdir()
    with pytest.raises(Killed):
        Trainer(Remembering(), config(ema=0.9), 5, tmp_path / "killed").fit(lambda first: killed_at(6))
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    assert_same(continued(tmp_path / "killed"), whole)


def signalled_in(where, step):
    """A trainer in which SIGTERM comes once, at a step, inside a part of it."""

    class Signalled(Trainer):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            place = {"forward": self.task.student, "optimizer": self.optimizer, "average": self.average}[where]
            name = "step" if where == "optimizer" else "forward" if where == "forward" else "update_parameters"
            original = getattr(place, name)

            def planted(*given, **more):
                result = original(*given, **more)
                if self.fitted.iterations == step:
                    os.kill(os.getpid(), signal.SIGTERM)
                return result

            setattr(place, name, planted)

    return Signalled


@pytest.mark.parametrize("where", ["forward", "optimizer", "average"])
@pytest.mark.usefixtures("terminated")
def test_a_signal_within_a_step_saves_the_whole_step(tmp_path, where):
    whole = undisturbed(tmp_path / "whole")
    (tmp_path / "stopped").mkdir()
    with pytest.raises(KeyboardInterrupt):
        signalled_in(where, 5)(Remembering(), config(ema=0.9), 5, tmp_path / "stopped").fit(
            batches, lambda kept: {"val/ap": 0.5}
        )
    again = continued(tmp_path / "stopped")
    assert again[2] == 6  # the step in which it came was finished and saved, though a checkpoint is due every fourth
    assert_same(again, whole)


@pytest.mark.usefixtures("terminated")
def test_a_signal_while_batches_are_loaded_or_ap_is_measured(tmp_path):
    every = {"validate_every": 5}
    whole = undisturbed(tmp_path / "whole", **every)
    folder = tmp_path / "stopped"
    folder.mkdir()

    stopped_loading(3, folder, **every)

    def measuring(kept):
        os.kill(os.getpid(), signal.SIGTERM)
        return {"val/ap": 0.0}

    second = Trainer(Remembering(), config(ema=0.9, **every), 5, folder)
    with pytest.raises(KeyboardInterrupt):
        second.fit(batches, measuring)
    assert second.task.clocks[0].iteration == 3
    again = continued(folder, **every)
    assert again[2] == 5
    assert_same(again, whole)  # with the AP of step 5, which the interruption had kept from being written


@pytest.mark.usefixtures("terminated")
def test_an_ap_that_was_written_is_not_measured_again(tmp_path):
    every = {"validate_every": 5}
    whole = undisturbed(tmp_path / "whole", **every)
    folder = tmp_path / "stopped"
    folder.mkdir()

    stopped_loading(5, folder, **every)  # right after the AP of the five steps before
    assert_same(continued(folder, **every), whole)


def test_damage_to_the_newest_checkpoint_costs_steps_and_not_the_result(tmp_path):
    whole = undisturbed(tmp_path / "whole")
    folder = tmp_path / "killed"
    folder.mkdir()
    with pytest.raises(Killed):
        Trainer(Remembering(), config(ema=0.9), 5, folder).fit(
            lambda first: killed_at(10), lambda kept: {"val/ap": 0.5}
        )
    newest = folder / "last.ckpt"
    newest.write_bytes(newest.read_bytes()[:-100])
    again = continued(folder)
    assert again[2] == 4
    assert_same(again, whole)


def test_a_disk_that_fills_up_stops_with_a_sentence_and_loses_nothing(tmp_path, monkeypatch):
    whole = undisturbed(tmp_path / "whole")
    folder = tmp_path / "full"
    folder.mkdir()
    fsync, calls = os.fsync, []

    def full(handle):
        if "last.partial" in os.readlink(f"/proc/self/fd/{handle}"):
            calls.append(handle)
            if len(calls) == 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"No space left on device; last\.ckpt of before stays"):
            Trainer(Remembering(), config(ema=0.9), 5, folder).fit(batches, lambda kept: {"val/ap": 0.5})
    again = continued(folder)
    assert again[2] == 4
    assert_same(again, whole)


def test_a_sum_that_is_not_finite_is_named(tmp_path):
    class Large(Task):
        def forward(self, images, targets, clock):
            large = 0.0 * self.student(images).sum() + 3e38
            return {"one": large, "two": large}

    with pytest.raises(PipelineError, match=r"step 0: loss \{'total': inf\}"):
        Trainer(Large(), config(), 5, tmp_path).fit(batches)


def test_observations_of_a_task_are_written(tmp_path):
    class Observing(Task):
        def observations(self):
            return {"seen": 1.5} if self.clocks[-1].iteration == 4 else {}

    Trainer(Observing(), config(), 5, tmp_path).fit(batches)
    assert [row["step"] for row in metrics(tmp_path) if "seen" in row] == [5]
