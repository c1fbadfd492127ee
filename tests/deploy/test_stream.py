"""Threads, and nothing that depends on time: sources and models wait for one another's events."""

from threading import Event

import numpy as np
import pytest
from PIL import Image

from deploy.errors import DeployError
from deploy.predictor import Predictor
from deploy.stream import Stream

LIMIT_S = 20  # only a test that fails waits so long


def grey(level):
    return np.full((64, 64, 3), level, np.uint8)


class Slow:
    """A predictor that takes its time over one frame: until `go` is set."""

    def __init__(self, predictor):
        self.predictor = predictor
        self.started, self.go = Event(), Event()

    def __call__(self, *arguments):
        self.started.set()
        assert self.go.wait(LIMIT_S)
        return self.predictor(*arguments)


@pytest.fixture
def predictor(model):
    with Predictor.open(model) as opened:
        yield opened


@pytest.fixture
def slow(predictor):
    return Slow(predictor)


def test_a_slow_model_sees_the_newest_frame_and_knows_what_it_missed(slow):
    def source():
        yield grey(255)
        assert slow.started.wait(LIMIT_S)  # the model has begun with frame 0
        for level in (10, 20, 30, 200):
            yield grey(level)
        slow.go.set()  # only now may it end

    with Stream(slow, source()) as stream:
        first, last = list(stream)
    assert (first.index, first.dropped, last.index, last.dropped) == (0, 0, 4, 3)
    assert last.frame[0, 0, 0] == 200
    # The detections are those of that frame: the tiny model's scores follow the brightness.
    np.testing.assert_allclose(last.detections.scores[0], 0.9 * 200 / 255, rtol=1e-5)


def test_a_slow_source_loses_nothing(predictor):
    seen = Event()

    def source():
        for level in (255, 250, 245):
            yield Image.new("RGB", (64, 64), (level,) * 3)
            assert seen.wait(LIMIT_S)
            seen.clear()

    results = []
    with Stream(predictor, source(), score_threshold=0.65) as stream:
        for one in stream:
            results.append((one.index, one.dropped, len(one.detections)))
            seen.set()
    assert results == [(0, 0, 2), (1, 0, 2), (2, 0, 2)]


def test_an_empty_source_ends_at_once(predictor):
    with Stream(predictor, []) as stream:
        assert list(stream) == []


def test_what_the_source_raises_reaches_the_caller_after_its_last_frame(slow):
    def source():
        yield grey(255)
        slow.go.set()
        raise RuntimeError("the cable is out")

    with Stream(slow, source()) as stream:
        results = iter(stream)
        assert next(results).index == 0
        with pytest.raises(RuntimeError, match="the cable is out"):
            next(results)


def test_a_wrong_frame_is_the_callers_error(predictor):
    with (
        Stream(predictor, [np.zeros((4, 4), np.uint8)]) as stream,
        pytest.raises(DeployError, match="uint8 RGB of shape"),
    ):
        list(stream)


def test_leaving_early_ends_the_source(predictor):
    ended = Event()

    def source():
        try:
            while True:
                yield grey(255)
        finally:
            ended.set()

    with Stream(predictor, source()) as stream:
        assert next(iter(stream)).index >= 0
    assert ended.is_set()
    with pytest.raises(DeployError, match="read or closed already"):
        next(iter(stream))


def test_a_source_that_does_not_answer_is_named_when_closing(predictor):
    entered, release = Event(), Event()

    def source():
        yield grey(255)
        entered.set()
        release.wait(LIMIT_S)
        yield grey(0)

    stream = Stream(predictor, source())
    next(iter(stream))
    assert entered.wait(LIMIT_S)
    with pytest.raises(DeployError, match="did not give or end a frame within 0 s"):
        stream.close(timeout_s=0)
    release.set()
    stream.close(LIMIT_S)


def test_a_stream_is_read_once(predictor):
    stream = Stream(predictor, [grey(255)])
    assert len(list(stream)) == 1
    with pytest.raises(DeployError, match="make a new one"):
        list(stream)
    stream.close()
