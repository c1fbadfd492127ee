"""The one clock of a training: every schedule reads it, and a resumed run sets it from its checkpoint."""

from __future__ import annotations

from typing import NamedTuple


class Clock(NamedTuple):
    """`iteration` counts from 0 to `iterations` - 1; `milestones` are the iterations at which the learning rate drops.

    A tuple, because Fabric walks through what a module is given and refuses frozen dataclasses.
    """

    iteration: int
    iterations: int
    iterations_per_epoch: int
    milestones: tuple[int, ...] = ()

    @property
    def epoch(self) -> int:
        return self.iteration // self.iterations_per_epoch


def warmed(weight: float, clock: Clock, iterations: int) -> float:
    """`weight` reached linearly over `iterations`, exactly 0 at the first (HEAD's schedule; todd/schedulers/linear.py)."""
    return weight * min(clock.iteration / iterations, 1.0) if iterations else weight


def stopped(weight: float, clock: Clock, last: int) -> float:
    """`weight` until the iteration `last`, which still has it, and 0 after it (todd's early stop, as it runs)."""
    return weight if clock.iteration <= last else 0.0
