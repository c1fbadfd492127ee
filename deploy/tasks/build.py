"""Another runtime's file from ONNX, built on the machine that will run it, with whatever the backend writes beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deploy.backend import Backend, backend_class
from deploy.errors import DeployError


def do(settings: dict[str, Any], folder: Path, out: Path) -> dict[str, Any]:
    """Leaves the file; returns its name as `file`, and what the backend's `build` says of it as `built`.

    Settings: model, backend, file (its name), build (the settings of the backend's `build`). Raises DeployError for a
    backend that builds nothing.
    """
    found = backend_class(settings["backend"])
    build = getattr(found, "build", None)
    if build is None or build is getattr(Backend, "build", None):
        raise DeployError(f"backend {settings['backend']}: it takes the ONNX file as it is; nothing is to be built")
    file = out / settings["file"]
    return {"file": file.name, "built": build(folder / settings["model"], file, **settings["build"])}
