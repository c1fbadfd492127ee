"""The number of workers: measured, and without any effect on what is yielded."""

import logging
from collections.abc import Generator
from itertools import islice

import pytest

from stages.data import workers as module
from stages.data.workers import MEASURED, measured_batches


class Clock:
    """Time that passes only when somebody says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


def run(
    monkeypatch: pytest.MonkeyPatch, waits: dict[int, float], most: int, step_s: float = 1.0
) -> list[tuple[int, int]]:
    """(step, workers) of each item, where a batch makes the training wait `waits[workers]` seconds."""
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    closed: list[int] = []

    def begin(first: int, workers: int) -> Generator[tuple[int, int], None, None]:
        try:
            while True:
                clock.now += waits[workers]
                yield first, workers
                first += 1
        finally:
            closed.append(workers)

    found = []
    for item in islice(measured_batches(begin, 5, most), 200):
        found.append(item)
        clock.now += step_s
    assert [step for step, _ in found] == list(range(5, 205))  # nothing is missing and nothing comes twice
    tried = list(dict.fromkeys(workers for _, workers in found))
    assert closed[: len(tried)] in (tried, tried[:-1])  # each has gone when the next begins
    return found


def test_more_as_long_as_it_pays(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="headstart"):
        found = run(monkeypatch, {0: 4.0, 1: 3.0, 2: 1.0, 4: 0.98}, most=8)
    assert list(dict.fromkeys(workers for _, workers in found)) == [0, 1, 2, 4]
    assert found[-1][1] == 4  # the shortest of all, though not worth going on for
    assert "workers: 4, by the time of a step: 5000.0 ms with 0, 4000.0 ms with 1" in caplog.text


def test_worse_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    found = run(monkeypatch, {0: 1.0, 1: 1.5}, most=8)
    assert list(dict.fromkeys(workers for _, workers in found)) == [0, 1]
    assert found[-1][1] == 0


def test_where_loading_costs_nothing_nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {workers for _, workers in run(monkeypatch, {0: 0.01}, most=8)} == {0}


def test_not_more_than_there_are_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    found = run(monkeypatch, {0: 8.0, 1: 4.0, 2: 2.0}, most=3)
    assert {workers for _, workers in found} == {0, 1, 2}
    assert sum(workers == 0 for _, workers in found) == MEASURED + 2
