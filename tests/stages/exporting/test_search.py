"""How far detections disagree, and how few layers are kept."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.detections import Detections
from stages.exporting.search import disagreement, fewest


def found(*rows):
    """Detections of (x1, y1, x2, y2, score, label)."""
    array = np.asarray(rows, np.float32).reshape(-1, 6)
    return Detections(array[:, :4].copy(), array[:, 4].copy(), array[:, 5].astype(np.int64))


CAT, DOG = (0, 0, 10, 10, 0.8, 0), (20, 20, 40, 40, 0.4, 1)


def test_the_same_agree_and_strangers_do_not():
    assert disagreement([found(CAT, DOG)], [found(CAT, DOG)]) == pytest.approx(0)
    assert disagreement([found(CAT)], [found(DOG)]) == pytest.approx(1)
    assert disagreement([found()], [found()]) == 0


def test_is_the_weighted_jaccard_index():
    assert disagreement([found(CAT, DOG)], [found(CAT)]) == pytest.approx(1 - 0.8 / 1.2)
    weaker = (*CAT[:4], 0.6, 0)
    assert disagreement([found(CAT)], [found(weaker)]) == pytest.approx(1 - 0.6 / 0.8)
    moved = (0, 0, 10, 8, 0.8, 0)
    assert disagreement([found(CAT)], [found(moved)]) == pytest.approx(1 - 0.8)


def test_another_label_shares_nothing():
    assert disagreement([found(CAT)], [found((*CAT[:5], 1))]) == pytest.approx(1)


@given(needed=st.integers(0, 12), most=st.integers(0, 12))
def test_finds_the_fewest_that_pass(needed, most):
    layers = [str(number) for number in range(10)]
    kept = fewest(layers, lambda names: len(names) >= needed, most)
    assert kept == (None if needed > min(most, 10) else tuple(layers[:needed]))


@given(passing=st.sets(st.integers(0, 10)), most=st.integers(0, 10))
def test_what_it_returns_has_passed(passing, most):
    """Also where more layers sometimes hurt."""
    kept = fewest([str(number) for number in range(10)], lambda names: len(names) in passing, most)
    assert kept is None or (len(kept) in passing and len(kept) <= most)
    if most in passing:
        assert kept is not None
