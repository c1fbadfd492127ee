import json

import numpy as np
import pytest

from deploy import arrivals
from deploy.arrivals import kept_up, serve
from deploy.errors import DeployError
from deploy.predictor import Predictor


class Clock:
    """Time that passes only where somebody waits or works."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        self.now += 1e-6  # so that whoever spins comes to an end
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def served(model, white, monkeypatch):
    """Serves with a predictor whose answers take the given seconds."""

    def run(rate, takes):
        clock = Clock()
        monkeypatch.setattr(arrivals, "time", clock)
        monkeypatch.setattr(arrivals, "warm_up", lambda *_: [])
        with Predictor.open(model) as predictor:
            left = iter(takes)
            monkeypatch.setattr(Predictor, "__call__", lambda *_: clock.sleep(next(left)))
            return serve(predictor, [white], rate, len(takes))

    return run


def test_who_is_fast_enough_answers_each_in_its_own_time(served):
    found = served(10.0, [0.02] * 100)
    assert found.response.p50 == pytest.approx(20, abs=0.1)
    assert found.response.p90 == pytest.approx(20, abs=0.1)
    assert found.busy == pytest.approx(0.2, abs=0.01)
    assert found.kept_up
    json.dumps(found.to_dict())


def test_a_stall_is_paid_by_all_that_were_due_meanwhile(served):
    """One answer of a second among 100 requests a second: timed call by call, one of 1,000 would be slow."""
    found = served(100.0, [0.001] * 500 + [1.0] + [0.001] * 499)
    assert found.kept_up
    assert found.response.p50 == pytest.approx(1, abs=0.1)
    assert found.response.p99 > 850


def test_a_queue_that_grows_is_said(served):
    found = served(100.0, [0.012] * 100)
    assert not found.kept_up
    assert found.busy == pytest.approx(1, abs=0.02)
    assert kept_up(np.zeros(1), 0.1)


def test_impossible_requests_are_refused(model, white):
    with Predictor.open(model) as predictor:
        for files, rate, requests in (([], 1.0, 1), ([white], 0.0, 1), ([white], 1.0, 0)):
            with pytest.raises(DeployError, match="arrivals: "):
                serve(predictor, files, rate, requests)
