"""Numbers as they are printed."""

from __future__ import annotations

import pytest

from stages.evaluation.report import wording


@pytest.mark.parametrize(
    ("value", "text"), [(0.593, "59.3"), (1.0, "100.0"), (-0.0004, "0.0"), (-0.021, "-2.1"), (None, "-")]
)
def test_ap(value: float | None, text: str) -> None:
    assert wording.ap(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.021, "+2.1"), (-0.021, "-2.1"), (0.0001, "0.0"), (-0.0001, "0.0"), (None, "-")]
)
def test_signed(value: float | None, text: str) -> None:
    assert wording.signed_ap(value) == text


@pytest.mark.parametrize(("value", "text"), [(95, "95 s"), (750, "12.5 min"), (11_160, "3.1 h")])
def test_seconds(value: float, text: str) -> None:
    assert wording.seconds(value) == text


def test_times_that_are_compared_have_one_unit() -> None:
    assert [wording.seconds(221, 320), wording.seconds(320, 221)] == ["3.7 min", "5.3 min"]
    assert wording.seconds(3600, 36_000) == "1.0 h"


def test_lists_and_sentences() -> None:
    assert [wording.listed(words) for words in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == [
        "",
        "a",
        "a and b",
        "a, b and c",
    ]
    assert wording.sentence("two\n  lines") == "Two lines."
    assert wording.sentence("Done.") == "Done."
    assert (wording.counted(1, "seed"), wording.counted(1200, "image")) == ("1 seed", "1,200 images")
    assert (wording.millions(482_586), wording.millions(31_200_000_000), wording.millions(12)) == (
        "483 k",
        "31.2 G",
        "12",
    )
