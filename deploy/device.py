"""Device: which machine did some work, as results carry it home: processor, GPUs, driver, board, power mode.

GPUs are asked of the CUDA driver itself (libcuda), which is there wherever CUDA works, on Jetson too; nothing is
installed for it. What cannot be read is None.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from deploy.cuda import devices
from deploy.machine import machine


def device(root: Path = Path("/")) -> dict[str, Any]:
    """`machine()` with the device's `name`, its `gpus`, `driver` and `cuda` versions, `board`, `l4t` and `power_mode`.

    The name is that of the GPUs, else of the board, else of the processor. `root` is where /proc, /etc and /var lie.
    """
    found = machine()
    gpus, cuda = devices()
    board = _read(root / "proc/device-tree/model").strip("\0\n ") or None
    of_gpus = ", ".join(dict.fromkeys(gpu["name"] for gpu in gpus))
    name = f"{board} ({of_gpus})" if board and gpus else of_gpus or board or found["cpu"]
    return found | {
        "name": name,
        "gpus": gpus,
        "driver": driver(_read(root / "proc/driver/nvidia/version")),
        "cuda": cuda,
        "board": board,
        "l4t": l4t(_read(root / "etc/nv_tegra_release")),
        "power_mode": power_mode(_read(root / "var/lib/nvpmodel/status"), _read(root / "etc/nvpmodel.conf")),
    }


def kind(of: dict[str, Any]) -> dict[str, Any]:
    """What results of another device differ in; not what an update or a power mode changes."""
    gpus = [{key: gpu[key] for key in ("name", "compute_capability")} for gpu in of["gpus"]]
    return {key: of[key] for key in ("name", "cpu", "architecture", "board")} | {"gpus": gpus}


def driver(text: str) -> str | None:
    """The version in /proc/driver/nvidia/version: `NVRM version: NVIDIA UNIX ... Kernel Module  550.54.15  ...`."""
    found = re.search(r"^NVRM version:.*?\s(\d{3,}(?:\.\d+)+)\s", text, re.MULTILINE)
    return found[1] if found else None


def l4t(text: str) -> str | None:
    """The release in /etc/nv_tegra_release: `# R36 (release), REVISION: 4.3, ...` is 36.4.3."""
    found = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", text)
    return f"{found[1]}.{found[2]}" if found else None


def power_mode(status: str, configuration: str) -> str | None:
    """The mode in nvpmodel's status file, `pmode:0002`, by its name in /etc/nvpmodel.conf where that has it."""
    found = re.search(r"pmode:(\d+)", status)
    if not found:
        return None
    number = int(found[1])
    named = re.search(rf"<\s*POWER_MODEL\s+ID=0*{number}\s+NAME=(\S+)\s*>", configuration)
    return named[1] if named else str(number)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
