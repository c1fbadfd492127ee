"""How long a model takes on this machine, step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deploy.latency import measure
from deploy.predictor import Predictor


def do(settings: dict[str, Any], folder: Path, out: Path) -> dict[str, Any]:
    """Returns a `Latency` as JSON values.

    Settings: model, backend, runtime (the backend's settings), images, measure (those of `deploy.latency.measure`).
    """
    images = [folder / image for image in settings["images"]]
    with Predictor.open(folder / settings["model"], settings["backend"], **settings["runtime"]) as predictor:
        return measure(predictor, images, **settings["measure"]).to_dict()
