"""Train the student with the chosen methods, and record what it computes before anything is pruned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from pipeline.config import Choice
from pipeline.errors import PipelineError, UserError
from stages.artifacts.checkpoint import Checkpoint, DistilledCheckpoint
from stages.artifacts.dataset import Dataset
from stages.detection.detector import Detector
from stages.detection.load import checksum, load_detector, parameter_count, save_weights
from stages.distillation.method import DistillationMethod
from stages.distillation.task import DistillationTask
from stages.evaluation.flops import methods_flops
from stages.evaluation.measure import average_precision
from stages.evaluation.probes import record_probes
from stages.training.loop import device_of
from stages.training.session import SessionConfig, begin, contradictions, train, training_split

RESUMES = SIDE_BY_SIDE = True
SCRATCH = ("last.ckpt",)


class Config(SessionConfig):
    student: Choice[Detector]
    """The student and its settings."""
    methods: dict[str, Choice[DistillationMethod]] = Field(min_length=1)
    """How it is helped: any name to a method; several act together."""
    probes: int = Field(default=8, ge=1)
    """Validation images on which the student's outputs are recorded, for the prune stage to reproduce."""


def check(config: Config, wired: Mapping[str, Any]) -> Iterable[str]:
    """Methods that need a teacher have one that they can learn from, and settings that the optimizer allows."""
    yield from contradictions(config)
    teachers = wired.get("teacher") or ()
    kinds = [chosen.cls for teacher in teachers if (chosen := getattr(teacher.config, "detector", None))]
    for name, method in config.methods.items():
        found = [
            method.cls.misfit(config.student.cls, kind) for kind in (kinds if method.cls.needs_teacher else [None])
        ]
        if method.cls.needs_teacher and not teachers:
            found.append(f"{method.name} needs a teacher; wire one with needs: {{teacher: STAGE}}")
        found.append(method.cls.misconfigured(method.config, config.optimizer))
        yield from (f"methods.{name}: {problem}" for problem in found if problem)


def run(config: Config, directory: Path, *, data: Dataset, teacher: Checkpoint | None = None) -> DistilledCheckpoint:
    """Distil; the teacher must leave with the weights it came with."""
    guide = None
    if teacher:
        if teacher.classes != data.classes:
            raise UserError(
                f"distill: the teacher {teacher.name} knows {list(teacher.classes[:5])}, the dataset {list(data.classes[:5])} "
                "(first five of each); a teacher must have learnt the same classes in the same order"
            )
        guide = load_detector(teacher.detector, len(teacher.classes), teacher.path(teacher.weights))
    before = checksum(guide) if guide else ""
    torch.manual_seed(config.seed)
    # The student comes first, so that it begins with the same weights as a control of the same seed.
    student = config.student.cls.build(config.student.config, len(data.classes))
    begin(student, config, data.classes)
    methods = {name: choice.cls(choice.config, student, guide) for name, choice in config.methods.items()}
    task = DistillationTask(student, guide, methods)
    if guide:
        guide.to(device_of(config))
    fitted = train(task, config, data, directory, lambda kept: average_precision(kept, data))
    if guide and checksum(guide) != before:
        raise PipelineError(
            "distill: the teacher's weights changed while it taught; a method trains what it must only read"
        )
    task.cpu().to(memory_format=torch.contiguous_format)  # as a file will give it back: the layout decides the last bit
    if guide:
        guide.cpu()
    save_weights(task, directory / "task.safetensors", data.classes)
    record_probes(student, data, config.probes, directory / "probes.safetensors")
    return DistilledCheckpoint(
        detector=config.student.dump(),
        classes=data.classes,
        weights="task.safetensors",
        parameters=parameter_count(student),
        metrics="metrics.jsonl",
        iterations=fitted.iterations,
        seconds=fitted.seconds,
        images=len(training_split(config, data)),
        seed=config.seed,
        source=teacher.key if teacher else "",
        methods={name: choice.dump() for name, choice in config.methods.items()},
        teacher=teacher.key if teacher else "",
        teacher_name=teacher.name if teacher else "",
        teacher_checksum=before,
        methods_flops=methods_flops(task, data.height, data.width),
        probes="probes.safetensors",
    )
