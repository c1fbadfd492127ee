"""The section on teachers and losses: what was measured stands there, and what was not is not invented."""

from __future__ import annotations

from typing import Any

import pytest

from stages.artifacts.checkpoint import DistilledCheckpoint, GradientShare, Teacher
from stages.evaluation.report import plots
from stages.evaluation.report.evidence import Evidence, Roles
from stages.evaluation.report.teaching import teaching

ROLES = Roles("teacher", "student", "control", "control_equal_time")


def section(story: Any) -> Any:
    return teaching(Evidence(**story.inputs(), roles=ROLES))


@pytest.fixture
def measured(story: Any) -> Any:
    """A story whose distillation left what it measured."""
    values = {
        "teachers": (
            Teacher(name="teacher", key="k", checksum="c", ap=0.456, images=100),
            Teacher(name="small", key="s", checksum="d", ap=None, images=100),
        ),
        "gradients": (
            GradientShare(loss="student/cls", neck=0.25, backbone=0.5),
            GradientShare(loss="head/akd", neck=0.75, backbone=0.5),
        ),
        "gradient_warnings": ("loss head/akd has 101 times the gradient",),
    }
    for index, one in enumerate(story.checkpoints):
        if isinstance(one, DistilledCheckpoint):
            changed = one.model_copy(update=values).placed(one.directory, name=one.name, key=one.key)
            story.checkpoints[index] = changed
    return story


def test_teachers_and_shares_are_told(measured: Any) -> None:
    found = section(measured)
    taught, shares = found.tables
    assert taught.rows == [
        ("distilled", "teacher", "45.6", "100 validation images"),
        ("distilled", "small", "-", "100 validation images"),
    ]
    assert shares.rows[1] == ("distilled", "head/akd", "75.0 %", "50.0 %")
    assert list(found.sentences) == ["distilled: loss head/akd has 101 times the gradient"]


def test_nothing_measured_nothing_told(story: Any) -> None:
    assert section(story) is None


def test_norms_are_no_losses() -> None:
    assert plots.is_loss("head/akd")
    assert not any(plots.is_loss(name) for name in ("lr", "val/ap", "gradient/neck/head/akd"))
