import json
import mmap
import time

import numpy as np
import pytest

from deploy import latency
from deploy.errors import DeployError
from deploy.latency import drift, forget_peak, measure, peak_rss_bytes, percentile, settled
from deploy.machine import cores, machine
from deploy.predictor import Predictor


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


def test_a_batch_is_timed_as_one_call(model, tmp_path, new_image, monkeypatch):
    files = [new_image(tmp_path / f"{i}.png") for i in range(3)]
    shapes = []
    with Predictor.open(model) as predictor:
        honest = predictor.infer
        monkeypatch.setattr(predictor, "infer", lambda batch: (shapes.append(batch.shape), honest(batch))[1])
        found = measure(predictor, files, iterations=20, batch=4)
    assert set(shapes) == {(4, 64, 64, 3)}
    assert found.batch == 4
    assert found.images_per_second == pytest.approx(4e3 / found.steps["end_to_end"].mean)


def test_every_call_is_kept_and_the_machine_is_watched(model, white):
    with Predictor.open(model) as predictor:
        found = measure(predictor, [white], iterations=30)
    begun, times = found.calls["at_s"], found.calls["end_to_end_ms"]
    assert begun[0] == 0
    assert begun == sorted(begun)
    assert np.mean(times) == pytest.approx(found.steps["end_to_end"].mean, abs=1e-3)
    assert found.evidence["samples"] >= 2
    assert found.evidence["seconds"] >= begun[-1]


def test_what_the_samples_tell_is_a_reason(model, white, monkeypatch):
    monkeypatch.setattr(latency, "doubts", lambda samples: [f"hot in {len(samples) > 1}"])
    with Predictor.open(model) as predictor:
        found = measure(predictor, [white], iterations=2)
    assert not found.reliable
    assert "hot in True" in found.reasons


def test_a_peak_can_be_forgotten():
    if peak_rss_bytes() is None or not forget_peak():
        pytest.skip("this system does not tell its peak memory, or does not reset it")
    # Of the system itself: an allocator may give what it holds, and keep what it gets back.
    with mmap.mmap(-1, 2**26) as held:
        for _ in range(64):
            held.write(bytes(2**20))
        high = peak_rss_bytes()
    assert forget_peak()
    assert peak_rss_bytes() < high - 2**25


def test_times_that_drift_are_not_believed():
    assert drift(np.full(40, 5.0)) == []
    assert "drifted: median 5.00 ms in the first half, 6.00" in drift(np.repeat([5.0, 6.0], 20))[0]


def test_warming_up_goes_on_until_it_is_steady(monkeypatch):
    falling = iter([*np.linspace(100, 10, 37), *([10.0] * 1000)])
    monkeypatch.setattr(latency, "_once", lambda *_: (0.0, 0.0, next(falling), 0.0))
    times = latency.warm_up(None, [None], 12)
    assert 37 < len(times) < 60
    assert settled(times)
    monkeypatch.setattr(latency, "_once", lambda *_: (0.0, 0.0, next(growing), 0.0))
    growing = iter(2.0 ** np.arange(200))
    assert len(latency.warm_up(None, [None], 12)) == 120  # never steady: an end all the same


def test_impossible_requests_are_refused(model, white):
    with Predictor.open(model) as predictor:
        for images, settings in (
            ([], {}),
            ([white], {"iterations": 0}),
            ([white], {"warmup": -1}),
            ([white], {"batch": 0}),
        ):
            with pytest.raises(DeployError, match="latency: "):
                measure(predictor, images, **settings)


def test_the_machine_has_a_name():
    described = machine()
    assert described["cpu"]
    assert described["cores"] == cores() >= 1
    assert described["memory_bytes"] is None or described["memory_bytes"] > 2**28
