"""One distillation: from the teachers to the checkpoint with its proofs. Every stage that distils passes here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config import Choice
from stages.artifacts.checkpoint import Checkpoint, DistilledCheckpoint, Teacher
from stages.artifacts.dataset import Dataset
from stages.detection.detector import Detector
from stages.detection.load import parameter_count, save_weights
from stages.detection.records import Targets
from stages.distillation import gradients
from stages.distillation.method import DistillationMethod
from stages.distillation.task import DistillationTask
from stages.distillation.teachers import check_untouched, load_teachers
from stages.distillation.unlabelled import Unlabelled, UnlabelledConfig, load
from stages.distillation.unlabelled import problems as unlabelled_problems
from stages.evaluation.flops import inference_flops
from stages.evaluation.measure import average_precision
from stages.evaluation.probes import record_probes
from stages.evaluation.teachers import examined
from stages.training.clock import Clock
from stages.training.loop import Fitted, device_of
from stages.training.scalars import EVENTS, METRICS
from stages.training.session import SAMPLES, SessionConfig, train, training_split

SCRATCH = ("last.ckpt", "previous.ckpt", "teachers.json")
"""Files that only a run which goes on needs."""


class DistillationConfig(SessionConfig):
    """Settings of every stage that distils."""

    methods: dict[str, Choice[DistillationMethod]] = Field(min_length=1)
    """How the student is helped: any name to a method; several act together."""
    probes: int = Field(default=8, ge=1)
    """Validation images on which the student's outputs are recorded, for the prune stage to reproduce."""
    teacher_sample: int = Field(default=100, ge=0)
    """Validation images on which each teacher's AP is measured before it teaches, the same ones always; 0 measures none."""
    unlabelled: UnlabelledConfig | None = None
    """Images without labels from which the student learns too, by the methods that compare features."""
    min_teacher_ap: float = Field(default=0.0, ge=0, le=1)
    """AP on the sample below which a teacher stops the stage; by default it is only recorded."""


def idle(config: DistillationConfig) -> Iterator[str]:
    """What is asked for and would do nothing: an AP that is not measured, images that no method learns from."""
    if config.min_teacher_ap and not config.teacher_sample:
        yield "min_teacher_ap: asks for an AP that teacher_sample: 0 does not measure; set teacher_sample"
    yield from unlabelled_problems(config.unlabelled, config.methods)


def without_labels(config: DistillationConfig, data: Dataset, directory: Path) -> Unlabelled | None:
    """The images without labels of this training, if there are any. Raises UserError where they cannot be used."""
    if config.unlabelled is None:
        return None
    split = load(config.unlabelled, data, directory)
    return Unlabelled(split, data.image_spec(), config.augment, config.unlabelled, config.seed)


def prepare(
    checkpoints: Sequence[Checkpoint], config: DistillationConfig, data: Dataset, directory: Path
) -> tuple[dict[str, Detector], tuple[Teacher, ...]]:
    """The teachers on the device of the training, by node name, and what is recorded of them. Raises UserError where one
    knows other classes or has less AP than asked."""
    guides = load_teachers(checkpoints, data.classes)
    for guide in guides.values():
        guide.to(device_of(config))
    notes = directory / "teachers.json"
    return guides, examined(checkpoints, guides, data, config.teacher_sample, config.min_teacher_ap, notes)


def teach(
    task: DistillationTask, teachers: Sequence[Teacher], config: DistillationConfig, data: Dataset, directory: Path
) -> Fitted:
    """Train; every teacher must leave with the weights it came with. Afterwards all is on the CPU."""
    fitted = train(task, config, data, directory, lambda kept: average_precision(kept, data))
    check_untouched(teachers, task.teachers)
    task.cpu().to(memory_format=torch.contiguous_format)  # as a file will give it back: the layout decides the last bit
    for guide in task.teachers.values():
        guide.cpu()
    return fitted


def record(
    task: DistillationTask,
    fitted: Fitted,
    config: DistillationConfig,
    data: Dataset,
    directory: Path,
    *,
    detector: dict[str, Any],
    source: str,
    teachers: tuple[Teacher, ...],
) -> DistilledCheckpoint:
    """Write the task's weights and the student's outputs on the probe images. `detector` are the student's settings,
    `source` is the key of what it was made from."""
    save_weights(task, directory / "task.safetensors", data.classes)
    record_probes(task.student, data, config.probes, directory / "probes.safetensors")
    measured = gradients.of_metrics(directory / METRICS)
    return DistilledCheckpoint(
        detector=detector,
        classes=data.classes,
        weights="task.safetensors",
        parameters=parameter_count(task.student),
        metrics=METRICS,
        tensorboard=EVENTS if config.tensorboard else None,
        iterations=fitted.iterations,
        seconds=fitted.seconds,
        waited=fitted.waited,
        samples=SAMPLES if fitted.iterations else None,
        images=len(training_split(config, data)),
        seed=config.seed,
        source=source,
        licences=tuple(sorted({task.student.licence, *(name for one in teachers for name in one.licences)} - {""})),
        methods={name: choice.dump() for name, choice in config.methods.items()},
        teachers=teachers,
        gradients=tuple(gradients.shares(measured)),
        gradient_warnings=tuple(gradients.warnings(measured)),
        unlabelled=task.unlabelled.count if task.unlabelled else 0,
        methods_flops=_methods_flops(task, data.height, data.width),
        probes="probes.safetensors",
    )


def _methods_flops(task: DistillationTask, height: int, width: int) -> int:
    """What the methods (and the teacher they ask) add to one training forward on one image of the canvas, with one
    object in its middle."""
    device = next(task.student.parameters()).device
    images = torch.zeros((1, 3, height, width), dtype=torch.uint8, device=device)
    box = torch.tensor([[width / 4, height / 4, width * 3 / 4, height * 3 / 4]], device=device)
    targets = Targets([box], [torch.zeros(1, dtype=torch.int64, device=device)], [(height, width)])
    task.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        task(images, targets, Clock(1, 2, 1))
    return int(counter.get_total_flops()) - inference_flops(task.student, height, width)
