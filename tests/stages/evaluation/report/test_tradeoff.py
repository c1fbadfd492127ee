"""Accuracy against latency: which files none beats, who was helped, and where nothing is to be weighed."""

from typing import Any

import pytest

from stages.evaluation.report import plots
from stages.evaluation.report.evidence import Evidence, Roles
from stages.evaluation.report.page import Page, html
from stages.evaluation.report.sections.results import models
from stages.evaluation.report.sections.tradeoff import candidates, tradeoff, unbeaten

ROLES = Roles("teacher", "student", "control", "control_equal_time")


@pytest.fixture
def weighed(story: Any) -> Evidence:
    """Beside the student's file that of the control, as fast and worse, one that is fast and poor, one slow and poor."""
    for name, source, quality, p50 in (
        ("plain", "control", 0.45, 4.5),
        ("fast", "", 0.6, 2.0),
        ("slow", "", 0.5, 9.0),
    ):
        story.row(name, "exported", quality, source=source, backend="onnxruntime 1.31.1")
        story.export(name, source)
        story.time(name, steps={"end_to_end": {"p50": p50}}, reliable=name != "slow")
    return Evidence(**story.inputs(), roles=ROLES)


def test_none_is_both_faster_and_better_than_those_named(weighed: Evidence) -> None:
    (found,) = candidates(weighed).values()
    assert [one.name for one in found] == ["fast", "onnx", "plain", "slow"]
    for one in found:
        beaten = any(o.ap >= one.ap and o.milliseconds <= one.milliseconds and o != one for o in found)
        assert (one in unbeaten(found)) is not beaten
    assert [one.name for one in unbeaten(found)] == ["fast", "onnx"]
    section = tradeoff(weighed)
    assert section is not None
    (sentence,) = section.sentences
    assert sentence.startswith("of 4 exported files, none is both faster and better than fast (2.00 ms, ")
    assert section.notes == ["times that the machine disturbed: slow"]
    (table,) = section.tables
    assert [row[:3] for row in table.rows] == [
        ("fast", "elsewhere", "yes"),
        ("onnx", "distill", "yes"),
        ("plain", "train", "no"),
        ("slow", "elsewhere", "no"),
    ]
    assert [row[4] for row in table.rows if row[4].endswith("?")] == ["9.00 ?"]
    assert html(Page("t", "v", None, [], [], [], [section])).count("<svg") == 1


def test_a_control_shares_its_network_with_the_student(weighed: Evidence) -> None:
    (found,) = candidates(weighed).values()
    networks = {one.name: one.network for one in found}
    assert networks["plain"] == networks["onnx"]
    assert len(set(networks.values())) == 3


def test_every_file_is_drawn_and_named(weighed: Evidence) -> None:
    (found,) = candidates(weighed).values()
    svg = plots.frontier(found, unbeaten(found))
    assert all(f">{one.name}<" in svg for one in found)


def test_two_files_are_not_weighed(story: Any) -> None:
    story.row("plain", "exported", 0.45, source="control", backend="onnxruntime 1.31.1")
    story.time("plain")
    assert tradeoff(Evidence(**story.inputs(), roles=ROLES)) is None
    story.row("untimed", "exported", 0.45, backend="onnxruntime 1.31.1")
    assert tradeoff(Evidence(**story.inputs(), roles=ROLES)) is None


def test_an_image_is_not_timed_by_calls_with_eight(story: Any) -> None:
    """Where both were measured the row of one image counts, whichever came first."""
    story.row("plain", "exported", 0.45, source="control", backend="onnxruntime 1.31.1")
    story.time("plain", batch=8, steps={"end_to_end": {"p50": 30.0}})
    assert "plain" not in [
        one.name for ones in candidates(Evidence(**story.inputs(), roles=ROLES)).values() for one in ones
    ]
    story.time("plain", steps={"end_to_end": {"p50": 5.0}})
    evidence = Evidence(**story.inputs(), roles=ROLES)
    assert {one.milliseconds for ones in candidates(evidence).values() for one in ones if one.name == "plain"} == {5.0}
    assert any("a call with 1 image or 8 images" in note for note in models(evidence).notes)
