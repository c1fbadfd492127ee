import json
import time

import numpy as np
import pytest

from deploy import latency
from deploy.errors import DeployError
from deploy.latency import doubts, measure, percentile, settled
from deploy.machine import cores, machine
from deploy.predictor import Predictor

QUIET = {"load_1min": 0.1, "cpu_mhz": 2000.0, "at_s": None, "own_s": None, "busy_s": None}


@pytest.mark.parametrize(("percent", "enough"), [(50, 20), (90, 100), (95, 200), (99, 1000)])
def test_a_percentile_wants_ten_samples_beyond_it(percent, enough):
    assert percentile(np.arange(enough - 1.0), percent) is None
    assert percentile(np.arange(enough + 0.0), percent) == pytest.approx(np.percentile(np.arange(enough), percent))


def test_each_step_is_timed_by_itself(model, white, monkeypatch):
    with Predictor.open(model) as predictor:
        honest = predictor.finish
        monkeypatch.setattr(predictor, "finish", lambda *given: (time.sleep(0.02), honest(*given))[1])
        found = measure(predictor, [white], warmup=10, iterations=20)
    assert list(found.steps) == ["decode", "preprocess", "inference", "postprocess", "end_to_end"]
    assert found.steps["postprocess"].mean >= 20
    assert found.steps["inference"].mean < 20
    parts = sum(timing.mean for name, timing in found.steps.items() if name != "end_to_end")
    assert found.steps["end_to_end"].mean == pytest.approx(parts)
    assert found.steps["end_to_end"].p50 is not None
    assert found.steps["end_to_end"].p90 is None
    assert all(timing.n == 20 for timing in found.steps.values())
    assert found.warmup >= 10
    assert found.peak_rss_bytes > 2**24
    assert found.backend["provider"] == "CPUExecutionProvider"
    json.dumps(found.to_dict())


def test_images_are_taken_in_turn(model, tmp_path, new_image, monkeypatch):
    files = [new_image(tmp_path / f"{i}.png") for i in range(3)]
    seen = []
    with Predictor.open(model) as predictor:
        honest = predictor.decode
        monkeypatch.setattr(predictor, "decode", lambda file: (seen.append(file.name), honest(file))[1])
        found = measure(predictor, files, warmup=10, iterations=6)
    assert seen[found.warmup :] == ["0.png", "1.png", "2.png"] * 2


def test_a_quiet_steady_run_is_believed():
    assert doubts(np.full(40, 5.0), QUIET, QUIET) == []


def test_what_speaks_against_the_numbers():
    steady = np.full(40, 5.0)
    assert "the machine was busy" in doubts(steady, QUIET | {"load_1min": cores() + 0.5}, QUIET)[0]
    assert "the machine was busy" in doubts(steady, QUIET, QUIET | {"load_1min": cores() + 0.5})[0]
    since = QUIET | {"at_s": 10.0, "own_s": 1.0, "busy_s": 100.0, "load_1min": cores() + 9}
    assert doubts(steady, since, since | {"at_s": 20.0, "own_s": 11.0, "busy_s": 111.0}) == []  # the load is history
    busy = since | {"at_s": 20.0, "own_s": 11.0, "busy_s": 115.0}
    assert "other processes used 0.50 of its cores" in doubts(steady, since, busy)[0]
    assert "the clock fell from 2000 to 1500" in doubts(steady, QUIET, QUIET | {"cpu_mhz": 1500.0})[0]
    assert "drifted: median 5.00 ms in the first half, 6.00" in doubts(np.repeat([5.0, 6.0], 20), QUIET, QUIET)[0]
    assert "not settled" in doubts(steady, QUIET, QUIET, steady=False)[0]
    assert doubts(steady, dict.fromkeys(QUIET), dict.fromkeys(QUIET)) == []  # a system that tells nothing


def test_warming_up_goes_on_until_it_is_steady(monkeypatch):
    falling = iter([*np.linspace(100, 10, 37), *([10.0] * 1000)])
    monkeypatch.setattr(latency, "_once", lambda *_: (0.0, 0.0, next(falling), 0.0))
    times = latency._warm_up(None, [None], 12)
    assert 37 < len(times) < 60
    assert settled(times)
    monkeypatch.setattr(latency, "_once", lambda *_: (0.0, 0.0, next(growing), 0.0))
    growing = iter(2.0 ** np.arange(200))
    assert len(latency._warm_up(None, [None], 12)) == 120  # never steady: an end all the same


def test_impossible_requests_are_refused(model, white):
    with Predictor.open(model) as predictor:
        for images, settings in (([], {}), ([white], {"iterations": 0}), ([white], {"warmup": -1})):
            with pytest.raises(DeployError, match="latency: "):
                measure(predictor, images, **settings)


def test_the_machine_has_a_name():
    described = machine()
    assert described["cpu"]
    assert described["cores"] == cores() >= 1
    assert described["memory_bytes"] is None or described["memory_bytes"] > 2**28
