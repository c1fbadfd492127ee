"""Gates: what passes, what fails, and that nothing unmeasured passes."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

import pytest

from stages.artifacts.reports import Gate
from stages.evaluation.report.chain import Hop
from stages.evaluation.report.comparison import Comparison, compare
from stages.evaluation.report.evidence import Evidence, Roles
from stages.evaluation.report.gates import Gates, failure, judge, junit, verdict

ROLES = Roles("teacher", "student", "control", "control_equal_time")


AGAIN = "to measure again, on a machine that does nothing else: `pipeline run CONFIG --force latency`"


def judged(story: Any, hops: tuple[Hop, ...] = (), **asked: Any) -> Gate:
    """The one gate that is asked for."""
    evidence = Evidence(**story.inputs(), roles=ROLES)
    absent = (Comparison("control", missing="no control"), Comparison("control_equal_time", missing="no control"))
    (gate,) = judge(Gates(**asked), evidence, hops, *absent)
    return gate


def compared(story: Any, **asked: Any) -> Gate:
    """The one gate on a gain that is asked for."""
    evidence = Evidence(**story.inputs(), roles=ROLES)
    both = [compare(evidence, control, samples=100) for control in ("control", "control_equal_time")]
    (gate,) = judge(Gates(**asked), evidence, (), *both)
    return gate


def hop(lost: float | None, kind: Any = "loss") -> Hop:
    """A hop from 0.5."""
    return Hop(
        source="a", target="b", kind=kind, source_ap=0.5, target_ap=None if lost is None else 0.5 - lost, lost=lost
    )


def test_only_what_is_asked_is_judged(story: Any) -> None:
    evidence = Evidence(**story.inputs(), roles=ROLES)
    assert judge(Gates(), evidence, [], Comparison("control"), Comparison("longer")) == []


def test_ap_is_compared_unrounded(story: Any) -> None:
    value = story.rows[0].statistics["ap"]
    assert judged(story, min_teacher_ap=value).passed
    just_above = judged(story, min_teacher_ap=value + 1e-5)
    assert not just_above.passed
    assert just_above.asked != f"at least {just_above.measured.removeprefix('teacher: ')}"


def test_every_exported_model_must_reach_min_ap(story: Any) -> None:
    story.row("poor", "exported", 0.1)
    gate = judged(story, min_ap=0.3)
    assert not gate.passed
    assert "poor: " in gate.measured
    assert "onnx" not in gate.measured
    assert gate.measured.endswith("(1 of 2 fail)")


@pytest.mark.parametrize(
    ("lost", "passed"), [(0.004, True), (0.005, True), (0.0051, False), (-0.2, True), (None, False)]
)
def test_drop(story: Any, lost: float | None, passed: bool) -> None:
    assert judged(story, (hop(lost),), max_ap_drop=0.005).passed is passed


def test_a_gap_is_no_drop_and_no_measurement_either(story: Any) -> None:
    assert judged(story, (hop(0.4, "gap"), hop(0.0)), max_ap_drop=0.005).passed
    alone = judged(story, (hop(0.4, "gap"),), max_ap_drop=0.005)
    assert not alone.passed
    assert alone.measured == "not measured: no hop after the training"


def test_p99(story: Any) -> None:
    passed, failed = judged(story, max_p99_ms=5.5), judged(story, max_p99_ms=5.4)
    assert (passed.passed, passed.measured) == (True, "onnx: 5.50 ms")
    assert (failed.passed, failed.measured) == (False, f"onnx: 5.50 ms; {AGAIN}")


def test_latency_that_no_stage_measures_cannot_be_measured_again(story: Any) -> None:
    story.latency_rows.clear()
    assert judged(story, max_p99_ms=5.5).measured == "not measured: no latency"


def test_p99_of_too_few_samples_has_not_passed(story: Any) -> None:
    story.latency_rows.clear()
    story.time("onnx", p99=None)
    gate = judged(story, max_p99_ms=1000)
    assert not gate.passed
    assert gate.measured == f"onnx: no p99: 200 samples are too few, it needs 1,000; {AGAIN}"


def test_unreliable_latency_has_not_passed(story: Any) -> None:
    story.latency_rows.clear()
    story.time("onnx", reliable=False, evidence={"reasons": ["the machine was busy: load 9.0 on 2 cores"]})
    gate = judged(story, max_p99_ms=1000)
    assert not gate.passed
    assert gate.measured == f"onnx: 5.50 ms (unreliable: the machine was busy: load 9.0 on 2 cores); {AGAIN}"


def test_size(story: Any) -> None:
    assert judged(story, max_megabytes=2.26).passed
    assert not judged(story, max_megabytes=2.25).passed


@pytest.mark.parametrize("asked", [{"min_gain_over_control": 0.1}, {"gain_interval_excludes_zero": True}])
def test_a_gain_of_some_of_the_seeds_has_not_passed(three_seeds: Any, asked: dict[str, Any]) -> None:
    assert compared(three_seeds, **asked).passed
    three_seeds.rows = [row for row in three_seeds.rows if row.name != "control[seed=2]"]
    gate = compared(three_seeds, **asked)
    assert not gate.passed
    assert "student[seed=2] (no control has its matrix values or seed)" in gate.measured


def test_gain_over_the_equal_time_control(story: Any) -> None:
    aps = {row.name: row.statistics["ap"] for row in story.rows}
    gain = aps["student"] - aps["control_equal_time"]
    assert 0 < gain < aps["student"] - aps["control"]  # so that the two controls cannot be confused
    assert compared(story, min_gain_over_equal_time_control=gain - 1e-6).passed
    gate = compared(story, min_gain_over_equal_time_control=gain + 0.01)
    assert (gate.passed, gate.measured) == (False, f"mean gain: {100 * gain:.1f} AP")


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (179.0, "in fact given less time than the student (179 s against 180 s)"),
        (0.0, "the times of training of student and its control are not both known"),
    ],
)
def test_an_equal_time_control_of_less_time_has_not_passed(
    story: Any, story_parts: Any, seconds: float, said: str
) -> None:
    story.checkpoints = [
        story_parts.changed(one, {"seconds": seconds}) if one.name == "control_equal_time" else one
        for one in story.checkpoints
    ]
    gate = compared(story, min_gain_over_equal_time_control=0.0)
    assert not gate.passed
    assert said in gate.measured


def test_an_equal_time_control_of_unknown_time_has_not_passed(story: Any) -> None:
    story.checkpoints = [one for one in story.checkpoints if one.name != "control_equal_time"]
    gate = compared(story, min_gain_over_equal_time_control=0.0)
    assert not gate.passed
    assert "times of training of student and its control are not both known" in gate.measured


@pytest.mark.parametrize(
    "asked",
    [
        {"min_gain_over_control": -1.0},
        {"min_gain_over_equal_time_control": -1.0},
        {"gain_interval_excludes_zero": True},
    ],
)
def test_a_gain_that_was_not_measured_has_not_passed(story: Any, asked: dict[str, Any]) -> None:
    gate = judged(story, **asked)
    assert not gate.passed
    assert "no control" in gate.measured


GOOD = Gate(name="good", asked="at least 1", measured="a: 2", passed=True)
BAD = Gate(name="bad", asked="at most 1 & no more", measured='"b" <c>: 2', passed=False)


def test_verdict_names_what_failed() -> None:
    assert verdict([]) == "No gates were asked for"
    assert verdict([GOOD, GOOD]) == "Passed: all 2 gates"
    assert verdict([GOOD, BAD]) == "Failed: bad"


def test_junit_has_one_case_a_gate() -> None:
    root = ElementTree.fromstring(junit([GOOD, BAD]).encode())
    (suite,) = root
    assert {root.get("failures"), suite.get("failures")} == {"1"}
    good, bad = suite
    assert good.find("failure") is None
    told = bad.find("failure")
    assert told is not None
    assert told.text == told.get("message") == failure(BAD) == 'gate bad: asked at most 1 & no more; "b" <c>: 2'


def test_of_a_sweep_the_first_row_is_judged(story: Any) -> None:
    story.latency_rows.clear()
    story.time("onnx", p99=5.0)
    story.time("onnx", p99=50.0, batch=8)
    assert judged(story, max_p99_ms=5.5).passed
