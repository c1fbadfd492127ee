"""Gates: what passes, what fails, and that nothing unmeasured passes."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

import pytest

from stages.artifacts.reports import Gate
from stages.evaluation.report.chain import Hop
from stages.evaluation.report.comparison import Comparison
from stages.evaluation.report.evidence import Evidence, Roles
from stages.evaluation.report.gates import Gates, failure, judge, junit, verdict

ROLES = Roles("teacher", "student", "control", "control_equal_time")


def judged(story: Any, hops: tuple[Hop, ...] = (), **asked: Any) -> Gate:
    """The one gate that is asked for."""
    evidence = Evidence(**story.inputs(), roles=ROLES)
    (gate,) = judge(Gates(**asked), evidence, hops, Comparison("control", missing="no control"))
    return gate


def hop(lost: float | None, kind: Any = "loss") -> Hop:
    """A hop from 0.5."""
    return Hop(
        source="a", target="b", kind=kind, source_ap=0.5, target_ap=None if lost is None else 0.5 - lost, lost=lost
    )


def test_only_what_is_asked_is_judged(story: Any) -> None:
    evidence = Evidence(**story.inputs(), roles=ROLES)
    assert judge(Gates(), evidence, [], Comparison("control")) == []


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
    assert judged(story, max_p99_ms=5.5).passed
    assert not judged(story, max_p99_ms=5.4).passed


def test_p99_of_too_few_samples_has_not_passed(story: Any) -> None:
    story.latency_rows.clear()
    story.time("onnx", p99=None)
    gate = judged(story, max_p99_ms=1000)
    assert not gate.passed
    assert gate.measured == "onnx: no p99: 200 samples are too few"


def test_unreliable_latency_has_not_passed(story: Any) -> None:
    story.latency_rows.clear()
    story.time("onnx", reliable=False, evidence={"reasons": ["the machine was busy: load 9.0 on 2 cores"]})
    gate = judged(story, max_p99_ms=1000)
    assert not gate.passed
    assert gate.measured == "onnx: 5.50 ms (unreliable: the machine was busy: load 9.0 on 2 cores)"


def test_size(story: Any) -> None:
    assert judged(story, max_megabytes=2.26).passed
    assert not judged(story, max_megabytes=2.25).passed


@pytest.mark.parametrize("asked", [{"min_gain_over_control": -1.0}, {"gain_interval_excludes_zero": True}])
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
