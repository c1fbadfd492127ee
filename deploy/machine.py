"""What machine this is: the identity every measured number carries."""

from __future__ import annotations

import os
import platform
from typing import Any


def machine() -> dict[str, Any]:
    """CPU model, cores this process may use, memory in bytes, operating system and Python; None where it cannot be
    read.
    """
    return {
        "cpu": cpu_model(),
        "cores": cores(),
        "memory_bytes": _memory_bytes(),
        "os": f"{platform.system()} {platform.release()}",
        "architecture": platform.machine(),
        "python": platform.python_version(),
    }


def cores() -> int:
    """How many cores this process may use: its affinity, not what the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_model() -> str:
    """The CPU's own name. ARM boards do not write one, there the device tree's board name stands in for it."""
    for line in _read("/proc/cpuinfo").splitlines():
        if line.lower().startswith(("model name", "hardware")):
            return line.partition(":")[2].strip()
    board = _read("/proc/device-tree/model").strip("\0\n ")
    return board or platform.processor() or platform.machine()


# What multiplies eight bits, in the words of /proc/cpuinfo: x86, then ARM.
_INT8 = ("avx2", "avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm")


def int8_instructions() -> tuple[str, ...]:
    """What this CPU has for products of eight-bit numbers; empty where it cannot be read."""
    for line in _read("/proc/cpuinfo").splitlines():
        if line.lower().startswith(("flags", "features")):
            there = set(line.partition(":")[2].split())
            return tuple(name for name in _INT8 if name in there)
    return ()


def _memory_bytes() -> int | None:
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    return None


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""
