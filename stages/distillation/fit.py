"""Whether methods fit a student and its teachers, found out at plan time: all are built on torch's meta device, which
has shapes and no memory. So a method says in one place, its `__init__`, what it cannot bridge, and the user hears it
before anything is trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache

import torch

from pipeline.config import Choice
from pipeline.errors import UserError
from stages.detection.detector import Detector
from stages.distillation.method import DistillationMethod
from stages.distillation.teachers import chosen
from stages.training.optimizer import OptimizerConfig

CLASSES = 2  # how many there are is not known before the data is read, and no shape that is compared depends on it


@lru_cache(maxsize=8)  # a matrix asks for the same pair once for every node
def shapes_of(choice: Choice[Detector]) -> Detector:
    """The detector of these settings, on the meta device; no weights are read."""
    with torch.device("meta"):
        detector: Detector = choice.cls.build(choice.config, CLASSES)
    return detector


def problems(
    student: Choice[Detector],
    methods: Mapping[str, Choice[DistillationMethod]],
    teachers: Mapping[str, Choice[Detector] | None],
    optimizer: OptimizerConfig,
) -> Iterator[str]:
    """What keeps each method from teaching this student; `teachers` by node name, None where one's settings are known
    only when it was made."""
    for name, method in methods.items():
        if problem := method.cls.misconfigured(method.config, optimizer):
            yield f"methods.{name}: {problem}"
        try:
            teacher = chosen(method.config.teacher, method.cls.needs_teacher, list(teachers))
        except UserError as error:
            yield f"methods.{name}: {error}"
            continue
        guide = teachers[teacher] if teacher is not None else None
        known = teacher is None or guide is not None
        if known and (problem := misfit(student, method, guide)):
            yield f"methods.{name}: {problem}"


def misfit(
    student: Choice[Detector], method: Choice[DistillationMethod], teacher: Choice[Detector] | None
) -> str | None:
    """Why this method cannot be built for this pair; None if it can."""
    try:
        with torch.device("meta"):
            method.cls(method.config, shapes_of(student), shapes_of(teacher) if teacher else None)
    except UserError as error:
        return str(error).removeprefix(f"method {method.name}: ")  # the config's own name of it stands before
    except RuntimeError as error:
        if "meta" not in str(error):
            raise
        # A method that reads values, and not only shapes, has to wait for them; it is built before the first step.
    return None


def built(
    methods: Mapping[str, Choice[DistillationMethod]], student: Detector, teachers: Mapping[str, Detector]
) -> dict[str, DistillationMethod]:
    """The methods for these detectors, in their order. Raises UserError where one cannot be built."""
    made = {}
    for name, method in methods.items():
        teacher = chosen(method.config.teacher, method.cls.needs_teacher, list(teachers))
        made[name] = method.cls(method.config, student, teachers[teacher] if teacher is not None else None)
    return made
