"""Train the student with the chosen methods, and record what it computes before anything is pruned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from pipeline.config import Choice
from stages.artifacts.checkpoint import Checkpoint, DistilledCheckpoint
from stages.artifacts.dataset import Dataset
from stages.detection.detector import Detector
from stages.detection.load import parameter_count, save_weights
from stages.distillation import fit, gradients
from stages.distillation.method import DistillationMethod
from stages.distillation.task import DistillationTask
from stages.distillation.teachers import check_untouched, load_teachers
from stages.evaluation.flops import methods_flops
from stages.evaluation.measure import average_precision
from stages.evaluation.probes import record_probes
from stages.evaluation.teachers import examined
from stages.training.loop import device_of
from stages.training.scalars import EVENTS, METRICS
from stages.training.session import SessionConfig, begin, contradictions, train, training_split

RESUMES = SIDE_BY_SIDE = True
SCRATCH = ("last.ckpt", "previous.ckpt", "teachers.json")


class Config(SessionConfig):
    student: Choice[Detector]
    """The student and its settings."""
    methods: dict[str, Choice[DistillationMethod]] = Field(min_length=1)
    """How it is helped: any name to a method; several act together."""
    probes: int = Field(default=8, ge=1)
    """Validation images on which the student's outputs are recorded, for the prune stage to reproduce."""
    teacher_sample: int = Field(default=100, ge=0)
    """Validation images on which each teacher's AP is measured before it teaches, the same ones always; 0 measures none."""
    min_teacher_ap: float = Field(default=0.0, ge=0, le=1)
    """AP on the sample below which a teacher stops the stage; by default it is only recorded."""


def check(config: Config, wired: Mapping[str, Any]) -> Iterable[str]:
    """Methods that need a teacher have one that they can learn from, and settings that the optimizer allows."""
    yield from contradictions(config)
    if config.min_teacher_ap and not config.teacher_sample:
        yield "min_teacher_ap: asks for an AP that teacher_sample: 0 does not measure; set teacher_sample"
    # What a pruning or a user's own stage makes is known only when it is made.
    teachers = {node.name: getattr(node.config, "detector", None) for node in wired.get("teacher") or ()}
    yield from fit.problems(config.student, config.methods, teachers, config.optimizer)


def run(
    config: Config, directory: Path, *, data: Dataset, teacher: list[Checkpoint] | None = None
) -> DistilledCheckpoint:
    """Distil; every teacher must leave with the weights it came with."""
    given = teacher or []
    guides = load_teachers(given, data.classes)
    for guide in guides.values():
        guide.to(device_of(config))
    teachers = examined(given, guides, data, config.teacher_sample, config.min_teacher_ap, directory / "teachers.json")
    torch.manual_seed(config.seed)
    # The student comes first, so that it begins with the same weights as a control of the same seed.
    student = config.student.cls.build(config.student.config, len(data.classes))
    begin(student, config, data.classes)
    task = DistillationTask(student, guides, fit.built(config.methods, student, guides))
    fitted = train(task, config, data, directory, lambda kept: average_precision(kept, data))
    check_untouched(teachers, guides)
    task.cpu().to(memory_format=torch.contiguous_format)  # as a file will give it back: the layout decides the last bit
    for guide in guides.values():
        guide.cpu()
    save_weights(task, directory / "task.safetensors", data.classes)
    record_probes(student, data, config.probes, directory / "probes.safetensors")
    measured = gradients.of_metrics(directory / METRICS)
    return DistilledCheckpoint(
        detector=config.student.dump(),
        classes=data.classes,
        weights="task.safetensors",
        parameters=parameter_count(student),
        metrics=METRICS,
        tensorboard=EVENTS if config.tensorboard else None,
        iterations=fitted.iterations,
        seconds=fitted.seconds,
        images=len(training_split(config, data)),
        seed=config.seed,
        source=teachers[0].key if teachers else "",
        methods={name: choice.dump() for name, choice in config.methods.items()},
        teachers=teachers,
        gradients=tuple(gradients.shares(measured)),
        gradient_warnings=tuple(gradients.warnings(measured)),
        methods_flops=methods_flops(task, data.height, data.width),
        probes="probes.safetensors",
    )
