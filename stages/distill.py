"""Train the student with the chosen methods, and record what it computes before anything is pruned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from pipeline.config import Choice
from stages.artifacts.checkpoint import Checkpoint, DistilledCheckpoint
from stages.artifacts.dataset import Dataset
from stages.detection.detector import Detector
from stages.distillation import fit, session
from stages.distillation.task import DistillationTask
from stages.training.session import begin, contradictions

RESUMES = SIDE_BY_SIDE = True
SCRATCH = session.SCRATCH


class Config(session.DistillationConfig):
    student: Choice[Detector]
    """The student and its settings."""


def check(config: Config, wired: Mapping[str, Any]) -> Iterable[str]:
    """Methods that need a teacher have one that they can learn from, and settings that the optimizer allows."""
    yield from contradictions(config)
    yield from session.idle(config)
    # What a pruning or a user's own stage makes is known only when it is made.
    teachers = {node.name: getattr(node.config, "detector", None) for node in wired.get("teacher") or ()}
    yield from fit.problems(config.student, config.methods, teachers, config.optimizer)


def run(
    config: Config, directory: Path, *, data: Dataset, teacher: list[Checkpoint] | None = None
) -> DistilledCheckpoint:
    """Distil; every teacher must leave with the weights it came with."""
    guides, teachers = session.prepare(teacher or [], config, data, directory)
    torch.manual_seed(config.seed)
    # The student comes first, so that it begins with the same weights as a control of the same seed.
    student = config.student.cls.build(config.student.config, len(data.classes))
    begin(student, config, data.classes)
    unlabelled = session.without_labels(config, data, directory)
    task = DistillationTask(student, guides, fit.built(config.methods, student, guides), unlabelled)
    fitted = session.teach(task, teachers, config, data, directory)
    source = teachers[0].key if teachers else ""
    detector = config.student.dump()
    return session.record(task, fitted, config, data, directory, detector=detector, source=source, teachers=teachers)
