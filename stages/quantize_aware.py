"""Quantisation-aware distillation: a detector teaches itself, rounded to eight bits, for a short schedule.

What comes out is a detector in float like any other, whose weights bear rounding better: it is pruned, exported and
quantised as what it began as. pkd and crosskd fit every detector to itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from pipeline.log import logger
from stages.artifacts.checkpoint import Checkpoint, DistilledCheckpoint
from stages.artifacts.dataset import Dataset
from stages.artifacts.exported_model import Int8Runtime
from stages.detection.load import build_detector, load_detector
from stages.detection.planned import planned_detector
from stages.distillation import fit, session
from stages.distillation.task import DistillationTask
from stages.training.fake_quantisation import fake_quantise
from stages.training.scalars import missing

RESUMES = SIDE_BY_SIDE = True
SCRATCH = session.SCRATCH


class Config(session.DistillationConfig):
    runtime: Int8Runtime = "onnxruntime"
    """Whose rounding is trained for, as in the quantize stage that follows."""
    float_layers: tuple[str, ...] = ()
    """Convolutions that will remain in float: names or patterns, as `head.regression_head.*`."""


def check(config: Config, wired: Mapping[str, Any]) -> Iterable[str]:
    """It begins with the checkpoint's weights and no others, and methods can bridge the detector to itself."""
    if config.weights or config.backbone_weights:
        yield "it begins with the weights of its checkpoint; remove `weights` and `backbone_weights`"
    if problem := missing(config.tensorboard):
        yield problem
    yield from session.idle(config)
    for node in wired.get("checkpoint", ()):
        student = planned_detector(node)
        if student is not None:
            yield from fit.problems(student, config.methods, {node.name: student}, config.optimizer)


def run(config: Config, directory: Path, *, checkpoint: Checkpoint, data: Dataset) -> DistilledCheckpoint:
    """Distil the detector into its rounded self; the file keeps the unrounded weights."""
    guides, teachers = session.prepare([checkpoint], config, data, directory)
    torch.manual_seed(config.seed)
    student = load_detector(checkpoint.detector, len(checkpoint.classes), checkpoint.path(checkpoint.weights))
    methods = fit.built(config.methods, student, guides)
    rounded = fake_quantise(student, data.height, data.width, config.runtime, config.float_layers)
    logger.info("%d convolutions are rounded to eight bits", len(rounded))
    task = DistillationTask(student, guides, methods, session.without_labels(config, data, directory))
    fitted = session.teach(task, teachers, config, data, directory)
    plain = build_detector(checkpoint.detector, len(checkpoint.classes))
    state = student.state_dict()
    plain.load_state_dict({key: state[key] for key in plain.state_dict()})
    task.student = plain
    return session.record(
        task,
        fitted,
        config,
        data,
        directory,
        detector=checkpoint.detector,
        source=checkpoint.key,
        teachers=teachers,
    )
