"""What an assistant is: a head of the teacher's kind on the student's features, with losses of its own.

It stands between a teacher and a student whose heads have nothing in common (arXiv 2207.05345): teacher and assistant
see the same RoIs, so their hidden layers can be compared, and through the assistant the gradient reaches the student's
backbone. Assistants live inside a method and are dropped with it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor, nn

from pipeline.config import BaseConfig
from stages.detection.detector import Detector, Features, RoIActivations, RoIs


class Assistant(nn.Module, ABC):
    """A head on the student's features; `hidden` are the widths of the layers that can be compared."""

    Config: ClassVar[type[BaseConfig]] = BaseConfig
    hidden: tuple[int, ...]

    @classmethod
    @abstractmethod
    def build(cls, config: Any, student: Detector, teacher: Detector | None) -> Assistant:
        """An assistant for this pair, with the teacher's weights where there is a teacher and `transfer` is on."""

    @abstractmethod
    def forward(self, features: Features, rois: RoIs) -> RoIActivations:
        """What the assistant makes of the student's features at `rois`."""

    @abstractmethod
    def loss(self, activations: RoIActivations, rois: RoIs) -> dict[str, Tensor]:
        """Its own losses against the ground truth."""
