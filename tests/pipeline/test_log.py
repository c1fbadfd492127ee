"""Progress as lines, metrics that survive a kill, and logs of our packages only."""

import itertools
import json
import logging
from pathlib import Path

import pytest

from pipeline import log
from pipeline.log import MetricsLog, duration, progress


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes four seconds at every look."""
    clock = itertools.count(0, 4)
    monkeypatch.setattr("pipeline.log.time.monotonic", lambda: float(next(clock)))


@pytest.mark.usefixtures("seconds")
def test_progress_is_a_line_now_and_then_with_rate_and_time_left(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "headstart")
    with progress("train", total=6, unit="loaf") as advance:
        for i in range(6):
            advance(1, loss=1 / (i + 1))
    lines = [record.message for record in caplog.records]
    assert lines[0] == "train: 3/6 loaf, 0.188 loaf/s, 16 s left, loss=0.3333"
    assert lines[-1].startswith("train: 6/6 loaf, ")
    assert lines[-1].endswith(", loss=0.1667")
    assert len(lines) == 3


@pytest.mark.usefixtures("seconds")
def test_progress_of_a_resumed_loop_counts_only_its_own_rate(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "headstart")
    with progress("train", total=8, done=6) as advance:
        advance(2)
    assert caplog.records[-1].message == "train: 8/8 step, 0.25 step/s in 8.0 s"


def test_an_exception_goes_through_progress_without_a_last_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "headstart")
    with pytest.raises(ZeroDivisionError), progress("train", total=2):
        raise ZeroDivisionError
    assert not caplog.records


def test_progress_on_a_terminal_is_a_bar(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from rich.console import Console

    with (tmp_path / "screen").open("w") as screen:
        handler = logging.NullHandler()
        handler.console = Console(file=screen, force_terminal=True, width=100)  # type: ignore[attr-defined]
        monkeypatch.setattr(log.logger, "handlers", [handler])
        with log.to_file(tmp_path / "run.log"), progress("train student[seed=0]", total=3) as advance:
            advance(3, loss=0.5)
    shown = (tmp_path / "screen").read_text()
    assert "train student[seed=0]" in shown
    assert "3/3" in shown
    assert "loss=0.5" in shown
    assert "train student[seed=0]: 3/3 step" in (tmp_path / "run.log").read_text()


def test_metrics_resume_where_the_checkpoint_was(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as metrics:
        for step in range(1, 5):
            metrics.write(step, loss=1 / step, phase="warm-up")
            assert len(path.read_text().splitlines()) == step  # flushed at every line
    with path.open("a") as file:
        file.write('{"step": 2, "lo')  # cut short by a kill
    with MetricsLog(path, resume_step=2) as metrics:
        metrics.write(3, loss=float("nan"))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[0] == {"step": 1, "loss": 1.0, "phase": "warm-up"}
    assert lines[2]["loss"] is None
    with MetricsLog(path):
        assert path.read_text() == ""


def test_run_log_has_our_packages_only(tmp_path: Path) -> None:
    with log.to_file(tmp_path / "run.log"):
        logging.getLogger("stages.train").info("ours")
        log.logger.info("ours too")
        logging.getLogger("torch").warning("theirs")
    log.logger.info("later")
    text = (tmp_path / "run.log").read_text()
    assert "ours" in text
    assert "ours too" in text
    assert "theirs" not in text
    assert "later" not in text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (3.21, "3.2 s"), (59.4, "59 s"), (245, "4 min 05 s"), (7810, "2 h 10 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
