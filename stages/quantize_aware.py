"""Quantisation-aware distillation: a detector teaches itself, rounded to eight bits, for a short schedule.

What comes out is a detector in float like any other, whose weights bear rounding better: it is pruned, exported and
quantised as what it began as.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from pipeline.config import Choice
from pipeline.log import logger
from stages.artifacts.checkpoint import Checkpoint, DistilledCheckpoint
from stages.artifacts.dataset import Dataset
from stages.artifacts.exported_model import Int8Runtime
from stages.detection.load import build_detector, load_detector, parameter_count, save_weights
from stages.detection.planned import planned_detector
from stages.distillation import fit, gradients
from stages.distillation.method import DistillationMethod
from stages.distillation.task import DistillationTask
from stages.distillation.teachers import check_untouched, load_teachers
from stages.evaluation.flops import methods_flops
from stages.evaluation.measure import average_precision
from stages.evaluation.probes import record_probes
from stages.evaluation.teachers import examined
from stages.training.fake_quantisation import fake_quantise
from stages.training.loop import device_of
from stages.training.scalars import EVENTS, METRICS, missing
from stages.training.session import SessionConfig, train, training_split

RESUMES = SIDE_BY_SIDE = True
SCRATCH = ("last.ckpt", "previous.ckpt", "teachers.json")


class Config(SessionConfig):
    methods: dict[str, Choice[DistillationMethod]] = Field(min_length=1)
    """How the float detector helps the rounded one: any name to a method; pkd and crosskd fit every detector to itself."""
    runtime: Int8Runtime = "onnxruntime"
    """Whose rounding is trained for, as in the quantize stage that follows."""
    float_layers: tuple[str, ...] = ()
    """Convolutions that will remain in float: names or patterns, as `head.regression_head.*`."""
    probes: int = Field(default=8, ge=1)
    """Validation images on which the detector's outputs are recorded, for the prune stage to reproduce."""
    teacher_sample: int = Field(default=100, ge=0)
    """Validation images on which the float detector's AP is measured before it teaches; 0 measures none."""


def check(config: Config, wired: Mapping[str, Any]) -> Iterable[str]:
    """It begins with the checkpoint's weights and no others, and methods can bridge the detector to itself."""
    if config.weights or config.backbone_weights:
        yield "it begins with the weights of its checkpoint; remove `weights` and `backbone_weights`"
    if problem := missing(config.tensorboard):
        yield problem
    for node in wired.get("checkpoint", ()):
        student = planned_detector(node)
        if student is not None:
            yield from fit.problems(student, config.methods, {node.name: student}, config.optimizer)


def run(config: Config, directory: Path, *, checkpoint: Checkpoint, data: Dataset) -> DistilledCheckpoint:
    """Distil the detector into its rounded self; the file keeps the unrounded weights."""
    guides = load_teachers([checkpoint], data.classes)
    for guide in guides.values():
        guide.to(device_of(config))
    teachers = examined([checkpoint], guides, data, config.teacher_sample, 0.0, directory / "teachers.json")
    torch.manual_seed(config.seed)
    student = load_detector(checkpoint.detector, len(checkpoint.classes), checkpoint.path(checkpoint.weights))
    methods = fit.built(config.methods, student, guides)
    rounded = fake_quantise(student, data.height, data.width, config.runtime, config.float_layers)
    logger.info("%d convolutions are rounded to eight bits", len(rounded))
    task = DistillationTask(student, guides, methods)
    fitted = train(task, config, data, directory, lambda kept: average_precision(kept, data))
    check_untouched(teachers, guides)
    for guide in guides.values():
        guide.cpu()
    task.cpu().to(memory_format=torch.contiguous_format)  # as a file will give it back: the layout decides the last bit
    plain = build_detector(checkpoint.detector, len(checkpoint.classes))
    state = student.state_dict()
    plain.load_state_dict({key: state[key] for key in plain.state_dict()})
    task.student = plain
    save_weights(task, directory / "task.safetensors", data.classes)
    record_probes(plain, data, config.probes, directory / "probes.safetensors")
    measured = gradients.of_metrics(directory / METRICS)
    return DistilledCheckpoint(
        detector=checkpoint.detector,
        classes=data.classes,
        weights="task.safetensors",
        parameters=parameter_count(plain),
        metrics=METRICS,
        tensorboard=EVENTS if config.tensorboard else None,
        iterations=fitted.iterations,
        seconds=fitted.seconds,
        images=len(training_split(config, data)),
        seed=config.seed,
        source=checkpoint.key,
        methods={name: choice.dump() for name, choice in config.methods.items()},
        teachers=teachers,
        gradients=tuple(gradients.shares(measured)),
        gradient_warnings=tuple(gradients.warnings(measured)),
        methods_flops=methods_flops(task, data.height, data.width),
        probes="probes.safetensors",
    )
