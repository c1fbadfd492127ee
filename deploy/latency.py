"""How long a predictor takes, step by step and end to end, and whether the machine was quiet enough to believe it."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deploy.conditions import DRIFT, Sampler, doubts, summary
from deploy.errors import DeployError
from deploy.machine import machine

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from deploy.predictor import Predictor

STEPS = ("decode", "preprocess", "inference", "postprocess")
PERCENTILES = (50, 90, 95, 99)
_BEYOND = 10  # samples that must lie beyond a percentile before it is more than the luck of a few calls


@dataclass(frozen=True)
class Timing:
    """Milliseconds of `n` calls; a percentile that `n` cannot carry is None."""

    n: int
    mean: float
    p50: float | None
    p90: float | None
    p95: float | None
    p99: float | None

    @classmethod
    def of(cls, milliseconds: NDArray[np.float64]) -> Timing:
        """The statistics of some calls."""
        values = {f"p{percent}": percentile(milliseconds, percent) for percent in PERCENTILES}
        return cls(n=len(milliseconds), mean=float(milliseconds.mean()), **values)


@dataclass(frozen=True)
class Latency:
    """Timings of decode, preprocess, inference, postprocess and end_to_end of calls with `batch` images each, with the
    evidence about the machine.

    `calls` has of every call that counts when it began (seconds from the first) and its end_to_end milliseconds.
    """

    steps: dict[str, Timing]
    batch: int
    iterations: int
    warmup: int
    steady: bool
    reliable: bool
    reasons: tuple[str, ...]
    evidence: dict[str, Any]
    calls: dict[str, list[float]]
    images_per_second: float
    peak_rss_bytes: int | None
    backend: dict[str, Any]
    machine: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"reasons": list(self.reasons)}


def percentile(milliseconds: NDArray[np.float64], percent: int) -> float | None:
    """That percentile, or None unless at least 10 samples lie beyond it: p50 wants 20, p90 100, p95 200, p99 1,000."""
    if len(milliseconds) * (100 - percent) < 100 * _BEYOND:
        return None
    return float(np.percentile(milliseconds, percent))


def measure(
    predictor: Predictor, image_files: Sequence[Path], warmup: int = 10, iterations: int = 200, batch: int = 1
) -> Latency:
    """Times `iterations` predictions of `batch` images each, taking the files in turn, after at least `warmup` that do
    not count.

    Warming up goes on until two fives of calls agree within 10 %, at most ten times as long. Decoding includes reading
    the file, from the operating system's cache after the first time. That inference is over when `infer` returns, on
    whatever device, is the backend's promise. Raises DeployError for no images or no iterations.
    """
    if not image_files or iterations < 1 or warmup < 0 or batch < 1:
        raise DeployError(
            f"latency: at least one image, one iteration and a batch of one are wanted, given {len(image_files)}, "
            f"{iterations} and {batch}, and no negative warmup, given {warmup}"
        )
    files = [Path(file) for file in image_files]
    warm = warm_up(predictor, files, warmup, batch)
    rows = np.empty((iterations, len(STEPS)))
    begun = np.empty(iterations)
    with Sampler("compute_capability" in predictor.backend.identity()) as sampler:
        for index in range(iterations):
            begun[index] = time.perf_counter()
            rows[index] = _once(predictor, _turn(files, index, batch))
    total = rows.sum(axis=1)
    steps = {name: Timing.of(column) for name, column in zip(STEPS, rows.T, strict=True)}
    steady = settled(warm)
    reasons = [] if steady else ["inference had not settled when the warm-up ended"]
    reasons += doubts(sampler.samples) + drift(rows[:, STEPS.index("inference")])
    return Latency(
        steps=steps | {"end_to_end": Timing.of(total)},
        batch=batch,
        iterations=iterations,
        warmup=len(warm),
        steady=steady,
        reliable=not reasons,
        reasons=tuple(reasons),
        evidence=summary(sampler.samples),
        calls={"at_s": (begun - begun[0]).round(4).tolist(), "end_to_end_ms": total.round(4).tolist()},
        images_per_second=float(1e3 * batch / total.mean()),
        peak_rss_bytes=peak_rss_bytes(),
        backend=predictor.backend.identity(),
        machine=machine(),
    )


def table(latency: Latency) -> list[str]:
    """What people read of it, line by line."""
    lines = [f"{'ms':14}{'mean':>9}" + "".join(f"{f'p{percent}':>9}" for percent in PERCENTILES)]
    for name, timing in latency.steps.items():
        values = [timing.mean, *(getattr(timing, f"p{percent}") for percent in PERCENTILES)]
        lines.append(f"{name:14}" + "".join(f"{'-' if value is None else f'{value:.2f}':>9}" for value in values))
    memory = "" if latency.peak_rss_bytes is None else f", peak memory {latency.peak_rss_bytes / 2**20:.0f} MiB"
    images = "one image" if latency.batch == 1 else f"{latency.batch} images"
    lines.append(
        f"{latency.iterations} calls of {images} after {latency.warmup} to warm up, "
        f"{latency.images_per_second:.1f} images a second{memory}"
    )
    lines.append(", ".join(f"{name} {value}" for name, value in latency.backend.items()))
    if any(timing.p99 is None for timing in latency.steps.values()):
        lines.append("-: too few calls for this percentile (p90 wants 100, p95 200, p99 1,000); see --iterations")
    if not latency.reliable:
        lines.append("unreliable: " + "; ".join(latency.reasons))
    return lines


def drift(inference_ms: NDArray[np.float64]) -> list[str]:
    """Why times should not be believed in themselves: the first half of the calls differs from the second."""
    if len(inference_ms) >= 2 * _BEYOND:
        first, second = (float(np.median(half)) for half in np.array_split(inference_ms, 2))
        if abs(second - first) > DRIFT * first:
            return [f"inference drifted: median {first:.2f} ms in the first half, {second:.2f} in the second"]
    return []


def settled(milliseconds: Sequence[float]) -> bool:
    """Whether the last five calls agree with the five before them, by their medians within 10 %."""
    if len(milliseconds) < 10:
        return False
    earlier, latest = float(np.median(milliseconds[-10:-5])), float(np.median(milliseconds[-5:]))
    return abs(latest - earlier) <= DRIFT * earlier


def peak_rss_bytes() -> int | None:
    """The most memory this process has held since it began, or since `forget_peak`; None where the system does not tell."""
    # Not getrusage: on Linux its maximum is inherited from the process that started this one, which may hold torch.
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return None
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None


def forget_peak() -> bool:
    """Lets `peak_rss_bytes` begin anew, for a second measurement in one process; False where the system does not allow
    it."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # proc(5): resets VmHWM
    except OSError:
        return False
    return True


def warm_up(predictor: Predictor, files: Sequence[Path], at_least: int, batch: int = 1) -> list[float]:
    """Inference milliseconds of calls that do not count; the other steps depend on which image it is."""
    at_least = max(at_least, 10)
    times: list[float] = []
    while len(times) < at_least or (not settled(times) and len(times) < 10 * at_least):
        times.append(_once(predictor, _turn(files, len(times), batch))[STEPS.index("inference")])
    return times


def _turn(files: Sequence[Path], index: int, batch: int) -> list[Path]:
    return [files[(index * batch + place) % len(files)] for place in range(batch)]


def _once(predictor: Predictor, files: Sequence[Path]) -> tuple[float, float, float, float]:
    start = time.perf_counter()
    images = [predictor.decode(file) for file in files]
    decoded = time.perf_counter()
    batch, placements = predictor.prepare(images)
    prepared = time.perf_counter()
    candidates = predictor.infer(batch)
    inferred = time.perf_counter()
    predictor.finish(candidates, placements)
    finished = time.perf_counter()
    return (
        1e3 * (decoded - start),
        1e3 * (prepared - decoded),
        1e3 * (inferred - prepared),
        1e3 * (finished - inferred),
    )
