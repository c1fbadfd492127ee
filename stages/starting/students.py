"""A student for a budget: of the settings that detectors offer (`Detector.students`), the largest that fits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from pipeline import lookup
from pipeline.config import Choice
from pipeline.errors import UserError
from stages.detection.detector import Detector
from stages.detection.load import parameter_count
from stages.evaluation.flops import inference_flops

DEFAULT_GFLOPS = 1.2  # what two CPU cores train in minutes on a canvas of 320 pixels


@dataclass(frozen=True)
class Student:
    """One choice, counted on the canvas."""

    choice: Choice[Detector]
    settings: Mapping[str, Any]
    """As the detector offers them."""
    gflops: float
    """10^9 operations of one image, features to heads; a multiply-add is two."""
    parameters: int

    def summary(self) -> str:
        """For people."""
        return f"{self.choice.name} on {self.settings['backbone']}, {self.gflops:.2f} GFLOPs, {self.parameters:,} parameters"


@lru_cache(maxsize=8)
def students(height: int, width: int, classes: int) -> tuple[Student, ...]:
    """All that the detectors offer, the smallest first."""
    package = f"{Detector.__module__}s"
    found = []
    for name in lookup.names(package):
        for settings in lookup.subclass(lookup.module(package, name), Detector).students:
            choice: Choice[Detector] = Choice.parse(Detector, {"name": name, **settings})
            found.append(_counted(choice, settings, height, width, classes))
    return tuple(sorted(found, key=lambda student: student.gflops))


def choose(height: int, width: int, classes: int, gflops: float | None) -> Student:
    """The largest within the budget. Raises UserError where none fits."""
    offered = students(height, width, classes)
    fitting = [student for student in offered if student.gflops <= (gflops or DEFAULT_GFLOPS)]
    if fitting:
        return fitting[-1]
    if gflops is None:  # a canvas so large that even the smallest is above the default
        return offered[0]
    raise UserError(
        f"--gflops: {gflops:g} asked for, the smallest student has {offered[0].gflops:.2f} on {height} x {width}; give more, "
        "or a smaller canvas with `size` later"
    )


def _counted(choice: Choice[Detector], settings: Mapping[str, Any], height: int, width: int, classes: int) -> Student:
    with torch.device("meta"):  # shapes without numbers
        detector: Detector = choice.cls.build(choice.config, classes)
        operations = inference_flops(detector, height, width)
    return Student(choice, settings, operations / 1e9, parameter_count(detector))


def explained(student: Student) -> list[tuple[str, Any, str]]:
    """(setting, value, meaning) of the settings that differ from the detector's defaults."""
    fields = type(student.choice.config).model_fields
    return [
        (name, student.settings[name], str(fields[name].description)) for name in fields if name in student.settings
    ]
