"""Which detector a stage of a plan will give, before anything is made."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.config import Choice
from pipeline.stage import NodeView
from stages.detection.detector import Detector


def planned_detector(node: NodeView) -> Choice[Detector] | None:
    """The detector that a node trains or distils, or that of the checkpoint it is given; None where it is not known."""
    for name in ("detector", "student"):
        choice: Choice[Detector] | None = getattr(node.config, name, None)
        if choice is not None:
            return choice
    return next((planned_detector(behind) for behind in node.feeding("checkpoint")), None)


def planned_licences(node: NodeView) -> Iterator[str]:
    """The licences that detectors bring into what a node makes: its own, its teachers', and those of what it is made of."""
    for name in ("detector", "student"):
        choice: Choice[Detector] | None = getattr(node.config, name, None)
        if choice is not None and choice.cls.licence:
            yield choice.cls.licence
    for slot in ("checkpoint", "teacher", "model"):
        for behind in node.feeding(slot):
            yield from planned_licences(behind)
