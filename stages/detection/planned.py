"""Which detector a stage of a plan will give, before anything is made."""

from __future__ import annotations

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
