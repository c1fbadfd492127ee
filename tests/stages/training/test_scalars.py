"""TensorBoard's events say what metrics.jsonl says; asked for where they cannot be written, the user hears so first."""

import importlib.util
import json

import pytest

from pipeline.errors import UserError
from stages.training import scalars
from stages.training.loop import Trainer, TrainingConfig
from stages.training.scalars import Scalars
from stages.training.session import SessionConfig, contradictions

from .test_loop import Task, batches


def test_metrics_alone_by_default(tmp_path):
    with Scalars(tmp_path, 0, tensorboard=False) as written:
        written.write(1, loss=0.5)
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 0.5}


def test_missing_package_is_a_sentence_at_plan_time_and_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(scalars, "find_spec", lambda name: None)
    assert list(contradictions(SessionConfig(steps=1))) == []
    (problem,) = contradictions(SessionConfig(steps=1, tensorboard=True))
    assert "tensorboardX is not installed; install the extra `tensorboard`" in problem
    with pytest.raises(UserError, match="tensorboardX is not installed"):
        Trainer(Task(), TrainingConfig(steps=1, device="cpu", tensorboard=True), 5, tmp_path)


def events(folder):
    """Scalars of all event files: (name, step) to value; the step from which each file counts."""
    from tensorboardX.proto.event_pb2 import Event

    found, purged = {}, []
    for file in sorted(folder.iterdir()):
        content, at = file.read_bytes(), 0
        while at < len(content):  # a TFRecord: length, its checksum, data, its checksum
            length = int.from_bytes(content[at : at + 8], "little")
            event = Event.FromString(content[at + 12 : at + 12 + length])
            at += 12 + length + 4
            if event.HasField("session_log"):
                purged.append(event.step)
            found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
    return found, purged


@pytest.mark.skipif(importlib.util.find_spec("tensorboardX") is None, reason="the extra `tensorboard` is not installed")
def test_events_hold_the_numbers_of_metrics(tmp_path):
    settings = TrainingConfig(steps=6, device="cpu", log_every=2, validate_every=3, tensorboard=True)
    Trainer(Task(), settings, 5, tmp_path).fit(batches, lambda kept: {"val/ap": 0.25})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    wanted = {(name, row["step"]): value for row in rows for name, value in row.items() if name != "step"}
    found, purged = events(tmp_path / "tensorboard")
    assert found == pytest.approx(wanted, rel=1e-6)
    assert purged in ([], [1])
    # A run that goes on from step 4 says so: what an interrupted run wrote after it is not shown.
    with Scalars(tmp_path, 4, tensorboard=True) as written:
        written.write(5, loss=float("nan"), lr=0.5)
    found, purged = events(tmp_path / "tensorboard")
    assert found["lr", 5] == 0.5
    assert ("loss", 5) not in found
    assert 5 in purged
