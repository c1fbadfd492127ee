"""Task: what the training loop trains."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import nn


class TrainingTask(nn.Module, ABC):
    """A module that returns named losses (its `forward` takes images, targets and a Clock), says which parameters learn
    how fast, and holds the detector that is kept."""

    student: nn.Module

    @abstractmethod
    def parameter_groups(self) -> list[tuple[list[nn.Parameter], float]]:
        """Trainable parameters with their share of the learning rate."""

    @abstractmethod
    def observations(self) -> dict[str, float]:
        """What the last step told beside its losses, for metrics.jsonl; at most steps nothing."""
