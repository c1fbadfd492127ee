"""How long requests wait that come at a fixed rate, whether or not the one before them is done.

Calls made one after another hide a stall: while it lasts nobody asks. Here every request has a time at which it is due,
and its latency counts from then, so a stall is paid by all that were due meanwhile.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from deploy.conditions import Sampler, doubts
from deploy.errors import DeployError
from deploy.latency import Timing, warm_up

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from deploy.predictor import Predictor

_SPIN_S = 5e-4  # a sleep ends late by about a tenth of this


@dataclass(frozen=True)
class Served:
    """Requests of one image each at `rate` a second: `response` in milliseconds from when one was due to its detections,
    `busy` the share of the time in which the predictor worked.

    `kept_up` is False when the queue grew from the first half of the requests to the second: then the percentiles tell
    how long was measured, not how fast the predictor is.
    """

    rate: float
    response: Timing
    busy: float
    kept_up: bool
    reliable: bool
    reasons: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"reasons": list(self.reasons)}


def serve(predictor: Predictor, image_files: Sequence[Path], rate: float, requests: int = 1000) -> Served:
    """Answers `requests` requests, due at even distances, by one predictor that takes them in their order.

    Raises DeployError for no images, no requests or a rate that is not above 0.
    """
    if not image_files or requests < 1 or not rate > 0:
        raise DeployError(
            f"arrivals: at least one image, one request and a rate above 0 are wanted, given {len(image_files)}, "
            f"{requests} and {rate}"
        )
    files = list(image_files)
    warm_up(predictor, files, 10)
    begun, ended = np.empty(requests), np.empty(requests)
    with Sampler("compute_capability" in predictor.backend.identity()) as sampler:
        start = time.perf_counter()
        due = start + np.arange(requests) / rate
        for index, moment in enumerate(due.tolist()):
            _wait_until(moment)
            begun[index] = time.perf_counter()
            predictor([files[index % len(files)]])
            ended[index] = time.perf_counter()
    reasons = doubts(sampler.samples)
    return Served(
        rate=rate,
        response=Timing.of(1e3 * (ended - due)),
        busy=float((ended - begun).sum() / (ended[-1] - start)),
        kept_up=kept_up(begun - due, 1 / rate),
        reliable=not reasons,
        reasons=tuple(reasons),
    )


def kept_up(late_s: NDArray[np.float64], period_s: float) -> bool:
    """Whether the requests of the second half began no later than those of the first, by their medians within a period."""
    halves = [part for part in np.array_split(late_s, 2) if len(part)]
    return float(np.median(halves[-1]) - np.median(halves[0])) <= period_s


def _wait_until(moment: float) -> None:
    if (left := moment - time.perf_counter()) > _SPIN_S:
        time.sleep(left - _SPIN_S)
    while time.perf_counter() < moment:
        pass
