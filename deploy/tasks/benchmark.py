"""How long a model takes on this machine, step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deploy.arrivals import serve
from deploy.latency import measure
from deploy.predictor import Predictor


def do(settings: dict[str, Any], folder: Path, out: Path) -> dict[str, Any]:
    """Returns a `Latency` as JSON values.

    Settings: model, backend, runtime (the backend's settings), images, measure (those of `deploy.latency.measure`), and
    maybe rate, requests a second that are answered too.
    """
    images = [folder / image for image in settings["images"]]
    with Predictor.open(folder / settings["model"], settings["backend"], **settings["runtime"]) as predictor:
        found = measure(predictor, images, **settings["measure"]).to_dict()
        rate = settings.get("rate")
        served = serve(predictor, images, rate, settings["measure"]["iterations"]).to_dict() if rate else None
        return found | {"at_rate": served}
