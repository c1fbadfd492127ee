"""What the machine does while something is measured: clocks, temperature, power, throttling and the work of others.

A thread samples what this machine tells: NVML for a GPU that the process computes on; for CPU and Jetson the files of
/proc and /sys that cpufreq, thermal zones and tegrastats read. What it does not tell is left out, never guessed.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deploy.machine import cores
from deploy.nvml import THROTTLING, Nvml

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from typing_extensions import Self

Sample = dict[str, float]
DRIFT = 0.10  # a clock that falls by more is no longer the same machine
_OTHERS = 0.25  # cores that other processes may keep busy meanwhile


class Sensors:
    """The files of this machine that tell something; found once, since looking for them takes longer than reading them.

    `root` is that of the file system. Temperatures are in degrees Celsius, power in watts, clocks in MHz.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._proc = root / "proc"
        system = root / "sys/devices/system/cpu"
        self._clocks = sorted(system.glob("cpu[0-9]*/cpufreq/scaling_cur_freq"))
        self._throttles = sorted(system.glob("cpu[0-9]*/thermal_throttle/core_throttle_count"))
        zones = sorted((root / "sys/class/thermal").glob("thermal_zone*"))
        self._temperatures = {f"{_text(zone / 'type') or zone.name}_c": zone / "temp" for zone in zones}
        # A Jetson's GPU scales by devfreq; its rails hang on INA3221 monitors; over-current events slow it down.
        gpus = [
            one for one in (root / "sys/class/devfreq").glob("*") if "gpu" in one.name or one.name.endswith("ga10b")
        ]
        self._gpu_clock = next((one / "cur_freq" for one in sorted(gpus)), None)
        monitors = sorted((root / "sys/class/hwmon").glob("hwmon*"))
        self._rails = {
            f"{_text(label)}_w": (label.with_name(f"in{number}_input"), label.with_name(f"curr{number}_input"))
            for monitor in monitors
            if _text(monitor / "name") == "ina3221"
            for label in sorted(monitor.glob("in[0-9]_label"))
            if (number := label.name[2]) and label.with_name(f"curr{number}_input").is_file()
        }
        self._over_currents = [file for monitor in monitors for file in sorted(monitor.glob("oc*_event_cnt"))]

    def read(self) -> Sample:
        """One sample: at_s, own_s (this process's CPU time) and whatever of load_1min, busy_s, cpu_mhz, gpu_mhz, NAME_c,
        NAME_w, cpu_throttles and over_currents (events since the machine started) the machine tells."""
        found = {"at_s": time.perf_counter(), "own_s": time.process_time()}
        told = {
            "load_1min": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
            "busy_s": self._busy_s(),
            "cpu_mhz": _scaled(_mean(self._clocks), 1e-3),
            "gpu_mhz": _scaled(_number(self._gpu_clock), 1e-6),
            "cpu_throttles": _total(self._throttles),
            "over_currents": _total(self._over_currents),
        }
        told |= {name: _scaled(_number(file), 1e-3) for name, file in self._temperatures.items()}
        for name, (millivolts, milliamperes) in self._rails.items():
            volt, ampere = _scaled(_number(millivolts), 1e-3), _scaled(_number(milliamperes), 1e-3)
            told[name] = None if volt is None or ampere is None else volt * ampere
        return found | {name: value for name, value in told.items() if value is not None}

    def _busy_s(self) -> float | None:
        """Seconds all cores together have worked since the machine started."""
        try:
            fields = (self._proc / "stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]
            user, nice, system, _, _, irq, softirq, steal = (int(field) for field in fields)
        except (OSError, ValueError):
            return None
        return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


class Sampler:
    """Samples in a thread, from the beginning to the end of a `with` block; `samples` holds them afterwards.

    At least two: one at each end. `gpu` says whether what is measured computes on one. The thread wakes once in
    `interval_s`, so it meets few of the calls that are timed.
    """

    def __init__(self, gpu: bool, interval_s: float = 1.0, sensors: Sensors | None = None) -> None:
        self.samples: list[Sample] = []
        self._interval_s = interval_s
        self._sensors = sensors or Sensors()
        self._gpu = Nvml.of_this_process() if gpu else None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._take()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()
        self._take()
        if self._gpu:
            self._gpu.close()

    def _run(self) -> None:
        while not self._ended.wait(self._interval_s):
            self._take()

    def _take(self) -> None:
        self.samples.append(self._sensors.read() | (self._gpu.sample() if self._gpu else {}))


def doubts(samples: Sequence[Sample]) -> list[str]:
    """Why what was measured between the first and the last sample should not be believed: other work, a clock that fell,
    throttling; empty when nothing speaks against it."""
    reasons = []
    others = others_cores(samples)
    loads = [sample["load_1min"] for sample in samples if "load_1min" in sample]
    if others is not None and others > _OTHERS:
        reasons.append(f"the machine was busy: other processes used {others:.2f} of its cores meanwhile")
    elif others is None and loads and max(loads) > cores():
        reasons.append(f"the machine was busy: load {max(loads):.1f} on {cores()} cores")
    for name, what in (("cpu_mhz", "the clock"), ("gpu_mhz", "the GPU's clock")):
        clocks = [sample[name] for sample in samples if name in sample]
        # Of thirds, not of single readings: a clock that breathes is not one that falls.
        medians = [float(np.median(part)) for part in np.array_split(clocks, 3) if len(part)]
        if medians and medians[-1] < (1 - DRIFT) * medians[0]:
            reasons.append(f"{what} fell from {medians[0]:.0f} to {medians[-1]:.0f} MHz")
    bits = {int(sample.get("gpu_throttling", 0)) for sample in samples}
    if causes := [cause for bit, cause in THROTTLING.items() if any(bit & one for one in bits)]:
        reasons.append(f"the GPU was throttled: {', '.join(causes)}")
    for name, what in (("cpu_throttles", "the CPU was throttled by heat"), ("over_currents", "over-current")):
        counts = [sample[name] for sample in samples if name in sample]
        if counts and counts[-1] > counts[0]:
            reasons.append(f"{what}: {counts[-1] - counts[0]:.0f} events meanwhile")
    return reasons


def others_cores(samples: Sequence[Sample]) -> float | None:
    """How many cores other processes kept busy between the first and the last sample; None where the system does not tell.

    The load average would be easier to read, and remembers for minutes the training that ended before a benchmark.
    """
    first, last = samples[0], samples[-1]
    if "busy_s" not in first or "busy_s" not in last or last["at_s"] <= first["at_s"]:
        return None
    foreign = (last["busy_s"] - first["busy_s"]) - (last["own_s"] - first["own_s"])
    return max(0.0, float(foreign / (last["at_s"] - first["at_s"])))


def summary(samples: Sequence[Sample]) -> dict[str, Any]:
    """For a report: how many samples over how many seconds, and least, median and most of every quantity."""
    names = dict.fromkeys(name for sample in samples for name in sample if name not in ("at_s", "own_s", "busy_s"))
    told: dict[str, Any] = {
        "samples": len(samples),
        "seconds": samples[-1]["at_s"] - samples[0]["at_s"],
        "others_cores": others_cores(samples),
    }
    for name in names:
        values = [sample[name] for sample in samples if name in sample]
        told[name] = {"min": min(values), "median": float(np.median(values)), "max": max(values)}
    return told


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _number(file: Path | None) -> float | None:
    try:
        return float(_text(file)) if file else None
    except ValueError:  # a zone that is switched off tells nothing
        return None


def _mean(files: Iterable[Path]) -> float | None:
    known = [value for file in files if (value := _number(file)) is not None]
    return sum(known) / len(known) if known else None


def _total(files: Iterable[Path]) -> float | None:
    known = [value for file in files if (value := _number(file)) is not None]
    return sum(known) if known else None


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor
