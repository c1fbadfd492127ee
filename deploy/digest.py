"""Digest: what a file is, as manifests list it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any


def digest(file: Path) -> dict[str, Any]:
    """`{sha256, size}` of a file."""
    # Read in pieces: a device may have less memory to spare than the model has bytes.
    sha256 = hashlib.sha256()
    with file.open("rb") as opened:
        while piece := opened.read(1 << 20):
            sha256.update(piece)
    return {"sha256": sha256.hexdigest(), "size": file.stat().st_size}
