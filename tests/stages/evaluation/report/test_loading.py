"""The section on training images: each sheet once, and how long trainings waited."""

import base64
from typing import Any

from stages.evaluation.report.evidence import Evidence, Roles
from stages.evaluation.report.page import Page, html
from stages.evaluation.report.sections.loading import loading

ROLES = Roles("teacher", "student", "control", "control_equal_time")


def with_sheets(story: Any) -> Any:
    """Every training left a sheet: the teacher its own, all others the same."""
    for index, one in enumerate(story.checkpoints):
        (one.directory / "samples.jpg").write_bytes(b"own" if one.name == "teacher" else b"shared")
        changed = one.model_copy(update={"samples": "samples.jpg", "waited": one.seconds / 3, "iterations": 5})
        story.checkpoints[index] = changed.placed(one.directory, name=one.name, key=one.key)
    return Evidence(**story.inputs(), roles=ROLES)


def test_sheets_and_waiting(story: Any) -> None:
    evidence = with_sheets(story)
    section = loading(evidence)
    assert section is not None
    names = [one.name for one in evidence.trainings]
    own, shared = section.strips
    assert own.panels[0].caption == "teacher"
    assert own.panels[0].uri == "data:image/jpeg;base64," + base64.b64encode(b"own").decode()
    assert shared.panels[0].caption == ", ".join(name for name in names if name != "teacher")
    assert [row[0] for row in section.tables[0].rows] == names
    assert {row[3] for row in section.tables[0].rows} == {"25.0 %"}
    page = Page("t", "v", None, [], [], [], [section])
    assert html(page).count(own.panels[0].uri) == 1


def test_nothing_trained_no_section(story: Any) -> None:
    story.checkpoints.clear()
    assert loading(Evidence(**story.inputs(), roles=ROLES)) is None
