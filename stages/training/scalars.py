"""The numbers of a training over its steps: metrics.jsonl always, and the same for TensorBoard where asked."""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from pipeline.log import MetricsLog

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter

METRICS, EVENTS = "metrics.jsonl", "tensorboard"


def missing(tensorboard: bool) -> str | None:
    """Why TensorBoard's events cannot be written here; None where they can, or are not asked for."""
    if not tensorboard or find_spec("tensorboardX"):
        return None
    return (
        "tensorboard: true asks for events and the package tensorboardX is not installed; install the extra "
        "`tensorboard`, or leave it out: metrics.jsonl has the same numbers"
    )


class Scalars:
    """Numbers of one training in `directory`; lines after `resume_step` are dropped."""

    def __init__(self, directory: Path, resume_step: int, tensorboard: bool) -> None:
        self._metrics = MetricsLog(directory / METRICS, resume_step)
        self._events: SummaryWriter | None = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._events = SummaryWriter(str(directory / EVENTS), purge_step=resume_step + 1, flush_secs=10)

    def write(self, step: int, **values: float) -> None:
        """Write numbers of one step; TensorBoard shows none that is not finite."""
        self._metrics.write(step, **values)
        if self._events:
            for name, value in values.items():
                if math.isfinite(value):
                    self._events.add_scalar(name, value, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._metrics.close()
        if self._events:
            self._events.close()
