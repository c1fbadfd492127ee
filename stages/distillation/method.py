"""What a distillation method is: it reads the typed predictions of a batch and returns named losses.

A method owns all that exists only while the student learns (adapters, assistant heads), so dropping the method is
pruning. It must not keep the student or the teacher: a module that is kept is a module that is registered and saved.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.config import BaseConfig
from stages.detection.detector import Detector
from stages.detection.proposals import SamplingSettings, sample_rois
from stages.detection.records import Features, Predictions, ProposalSettings, RoIs, Targets
from stages.training.clock import Clock
from stages.training.optimizer import OptimizerConfig

Record = TypeVar("Record")


def in_full(record: Record) -> Record:
    """A (nested) record or tuple with every half-precision tensor in float32."""
    # mypy cannot see that each branch gives back the kind of thing it was given.
    if isinstance(record, Tensor):
        return record.float() if record.dtype in (torch.float16, torch.bfloat16) else record  # type: ignore[return-value]
    if isinstance(record, tuple):
        return tuple(in_full(item) for item in record)  # type: ignore[return-value]
    if is_dataclass(record) and not isinstance(record, type):
        return replace(record, **{f.name: in_full(getattr(record, f.name)) for f in fields(record)})
    return record


class FeatureBatch(Protocol):
    """What a method reads that compares features alone: it can be had of images without labels too."""

    clock: Clock

    @property
    def features(self) -> Features: ...
    @property
    def teacher_features(self) -> Features: ...


def frozen_features(teacher: Detector, images_BCHW: Tensor, half: torch.dtype | None) -> Features:
    """A teacher's backbone and neck, without a gradient; computed in `half` if that is given, told in full."""
    with torch.no_grad(), torch.autocast(images_BCHW.device.type, dtype=half, enabled=half is not None):
        features: Features = teacher.features(images_BCHW)
    return in_full(features)


@dataclass
class UnlabelledBatch:
    """Images without labels as the student saw them, and one teacher, which is asked at most once."""

    images_BCHW: Tensor
    features: Features
    clock: Clock
    teacher: Detector
    half: torch.dtype | None = None

    @cached_property
    def teacher_features(self) -> Features:
        """The frozen teacher's backbone and neck on the same images."""
        return frozen_features(self.teacher, self.images_BCHW, self.half)


@dataclass
class DistillationBatch:
    """One batch as the student saw it, and one teacher. What is asked of the teacher runs at most once, and only when
    asked for; methods with the same teacher share it, and all share the RoIs."""

    images_BCHW: Tensor
    targets: Targets
    student: Detector
    features: Features
    predictions: Predictions
    clock: Clock
    teacher: Detector | None = None
    half: torch.dtype | None = None  # the reduced precision in which the teacher runs; what it says is read in full
    _rois: dict[object, RoIs] = field(default_factory=dict)

    @cached_property
    def teacher_features(self) -> Features:
        """The frozen teacher's backbone and neck on the same images."""
        assert self.teacher is not None, "a method that needs a teacher was given none"
        return frozen_features(self.teacher, self.images_BCHW, self.half)

    @cached_property
    def teacher_predictions(self) -> Predictions:
        """The frozen teacher's heads."""
        assert self.teacher is not None, "a method that needs a teacher was given none"
        with torch.no_grad(), self._reduced():
            predictions: Predictions = self.teacher.predict(self.teacher_features)
        return in_full(predictions)

    def _reduced(self) -> torch.autocast:
        return torch.autocast(self.images_BCHW.device.type, dtype=self.half, enabled=self.half is not None)

    def rois(self, proposals: ProposalSettings, sampling: SamplingSettings) -> RoIs:
        """The student's proposals, sampled with the targets: one set for all methods with equal settings."""
        key = (proposals, sampling)
        if key not in self._rois:
            found = self.student.proposals(self.predictions, self.targets.sizes, proposals)
            self._rois[key] = sample_rois(found, self.targets, sampling)
        return self._rois[key]


def kinds(student: Detector, teacher: Detector | None) -> str:
    """A pair as errors name it."""
    return f"{type(student).__name__} and {type(teacher).__name__ if teacher else 'no teacher'}"


class MethodConfig(BaseConfig):
    """Settings that every method has."""

    lr_scale: float = Field(default=1.0, gt=0)
    """Learning rate of the method's own adapters and assistants, as a multiple of the student's."""
    teacher: str | None = None
    """Stage whose detector it learns from, where several are wired; may be left out where there is one."""


class DistillationMethod(nn.Module, ABC):
    """One way to help a student learn."""

    Config: ClassVar[type[MethodConfig]] = MethodConfig
    needs_teacher: ClassVar[bool] = True
    learns_unlabelled: ClassVar[bool] = False
    """Whether `forward` takes a `FeatureBatch`, and so can be called on images without labels too; it keeps nothing of them."""
    config: Any

    @abstractmethod
    def __init__(self, config: Any, student: Detector, teacher: Detector | None) -> None:
        """Read shapes of student and teacher; keep neither. Raises UserError where they cannot be bridged: before anything
        is trained, for it is called on detectors without numbers when a run is planned."""
        super().__init__()

    @classmethod
    def misconfigured(cls, config: Any, optimizer: OptimizerConfig) -> str | None:
        """Why these settings cannot work with such an optimizer, known before anything is trained; None if they can."""
        return None

    @abstractmethod
    def forward(self, batch: DistillationBatch) -> Mapping[str, Tensor]:
        """Named scalar losses, already weighted, summed over levels (the convention of HEAD and PKD)."""
