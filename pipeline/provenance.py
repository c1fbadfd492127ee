"""Provenance: how and where an artifact was made. It lies beside the artifact and is no part of its key."""

import os
import platform
import subprocess
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

DISTRIBUTIONS = ("torch", "torchvision", "onnx", "onnxruntime", "numpy", "Pillow", "ultralytics")
"""Whose versions are recorded; a change of one also makes the remembered plan stale."""


def versions() -> dict[str, str]:
    """Return the versions of those of the named distributions that are installed."""
    found = {}
    for name in DISTRIBUTIONS:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def of_process(code: Path | None) -> dict[str, Any]:
    """Return what all artifacts of one process share; `code` is the folder whose git commit is recorded, if any."""
    return {
        "commit": _commit(code) if code else None,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        "cpus": os.cpu_count(),
        "versions": versions(),
        "argv": sys.argv,
    }


def _commit(folder: Path) -> dict[str, Any] | None:
    """Return commit and whether tracked files were changed, or None when git does not track the folder's code."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        if not git("ls-files", "--", "."):  # a folder inside somebody else's repository, as site-packages may be
            return None
        return {"id": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None
