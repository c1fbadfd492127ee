"""How long a predictor takes, step by step and end to end, and whether the machine was quiet enough to believe it."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deploy.errors import DeployError
from deploy.machine import cores, machine

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from deploy.predictor import Predictor

STEPS = ("decode", "preprocess", "inference", "postprocess")
PERCENTILES = (50, 90, 95, 99)
_BEYOND = 10  # samples that must lie beyond a percentile before it is more than the luck of a few calls
_DRIFT = 0.10
_OTHERS = 0.25  # cores that other processes may keep busy while latency is measured


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
    """Timings of decode, preprocess, inference, postprocess and end_to_end for single images, with the evidence about
    the machine.
    """

    steps: dict[str, Timing]
    iterations: int
    warmup: int
    steady: bool
    reliable: bool
    reasons: tuple[str, ...]
    evidence: dict[str, Any]
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


def measure(predictor: Predictor, image_files: Sequence[Path], warmup: int = 10, iterations: int = 200) -> Latency:
    """Times `iterations` predictions of one image each, taking the files in turn, after at least `warmup` that do not
    count.

    Warming up goes on until two fives of calls agree within 10 %, at most ten times as long. Decoding includes reading
    the file, from the operating system's cache after the first time. Raises DeployError for no images or no iterations.
    """
    if not image_files or iterations < 1 or warmup < 0:
        raise DeployError(
            f"latency: at least one image and one iteration are wanted, given {len(image_files)} and {iterations}, "
            f"and no negative warmup, given {warmup}"
        )
    files = [Path(file) for file in image_files]
    before = _evidence()
    warm = _warm_up(predictor, files, warmup)
    rows = np.asarray([_once(predictor, files[index % len(files)]) for index in range(iterations)])
    after = _evidence()
    total = rows.sum(axis=1)
    steps = {name: Timing.of(column) for name, column in zip(STEPS, rows.T, strict=True)}
    steady = settled(warm)
    reasons = doubts(rows[:, STEPS.index("inference")], before, after, steady)
    return Latency(
        steps=steps | {"end_to_end": Timing.of(total)},
        iterations=iterations,
        warmup=len(warm),
        steady=steady,
        reliable=not reasons,
        reasons=tuple(reasons),
        evidence={"before": before, "after": after},
        peak_rss_bytes=peak_rss_bytes(),
        backend=predictor.backend.identity(),
        machine=machine(),
    )


def doubts(
    inference_ms: NDArray[np.float64], before: dict[str, Any], after: dict[str, Any], steady: bool = True
) -> list[str]:
    """Why the numbers should not be believed: load, a clock that fell, times that drift; empty when nothing speaks
    against them.
    """
    reasons = [] if steady else ["inference had not settled when the warm-up ended"]
    others = others_cores(before, after)
    loads = [evidence["load_1min"] for evidence in (before, after) if evidence["load_1min"] is not None]
    if others is not None and others > _OTHERS:
        reasons.append(f"the machine was busy: other processes used {others:.2f} of its cores meanwhile")
    elif others is None and loads and max(loads) > cores():
        reasons.append(f"the machine was busy: load {max(loads):.1f} on {cores()} cores")
    clocks = before["cpu_mhz"], after["cpu_mhz"]
    if clocks[0] and clocks[1] and clocks[1] < (1 - _DRIFT) * clocks[0]:
        reasons.append(f"the clock fell from {clocks[0]:.0f} to {clocks[1]:.0f} MHz")
    if len(inference_ms) >= 2 * _BEYOND:
        first, second = (float(np.median(half)) for half in np.array_split(inference_ms, 2))
        if abs(second - first) > _DRIFT * first:
            reasons.append(f"inference drifted: median {first:.2f} ms in the first half, {second:.2f} in the second")
    return reasons


def others_cores(before: dict[str, Any], after: dict[str, Any]) -> float | None:
    """How many cores other processes kept busy between two evidences; None where the system does not tell.

    The load average would be easier to read, and remembers for minutes the training that ended before a benchmark.
    """
    if before["busy_s"] is None or after["busy_s"] is None or after["at_s"] <= before["at_s"]:
        return None
    foreign = (after["busy_s"] - before["busy_s"]) - (after["own_s"] - before["own_s"])
    return max(0.0, float(foreign / (after["at_s"] - before["at_s"])))


def settled(milliseconds: Sequence[float]) -> bool:
    """Whether the last five calls agree with the five before them, by their medians within 10 %."""
    if len(milliseconds) < 10:
        return False
    earlier, latest = float(np.median(milliseconds[-10:-5])), float(np.median(milliseconds[-5:]))
    return abs(latest - earlier) <= _DRIFT * earlier


def peak_rss_bytes() -> int | None:
    """The most memory this process has held; None where the system does not tell."""
    # Not getrusage: on Linux its maximum is inherited from the process that started this one, which may hold torch.
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return None
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None


def _once(predictor: Predictor, file: Path) -> tuple[float, float, float, float]:
    start = time.perf_counter()
    image = predictor.decode(file)
    decoded = time.perf_counter()
    batch, placements = predictor.prepare([image])
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


def _warm_up(predictor: Predictor, files: Sequence[Path], at_least: int) -> list[float]:
    """Inference milliseconds of the calls that do not count; the other steps depend on which image it is."""
    at_least = max(at_least, 10)
    times: list[float] = []
    while len(times) < at_least or (not settled(times) and len(times) < 10 * at_least):
        times.append(_once(predictor, files[len(times) % len(files)])[STEPS.index("inference")])
    return times


def _evidence() -> dict[str, Any]:
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "load_1min": load,
        "cpu_mhz": _cpu_mhz(),
        "at_s": time.perf_counter(),
        "own_s": time.process_time(),
        "busy_s": _busy_s(),
    }


def _busy_s() -> float | None:
    """Seconds all cores together have worked since the machine started; None where the system does not tell."""
    try:
        fields = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]
        user, nice, system, _, _, irq, softirq, steal = (int(field) for field in fields)
    except (OSError, ValueError):
        return None
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _cpu_mhz() -> float | None:
    """The mean clock of all cores; None where the system hides it, as many virtual machines and containers do."""
    files = Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_cur_freq")
    try:
        found = [int(file.read_text(encoding="ascii")) / 1e3 for file in files]
    except (OSError, ValueError):
        return None
    return float(np.mean(found)) if found else None
