"""Another runtime's file from ONNX, built on the machine that will run it, and what it detects there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from deploy.backend import backend_class, build_engine
from deploy.contract import Contract
from deploy.parity import unsuppressed
from deploy.predictor import Predictor

DETECTIONS = "detections.json"


def do(settings: dict[str, Any], folder: Path, out: Path) -> dict[str, Any]:
    """Leaves the file with its sidecar; returns its name as `file`, the sidecar as `built`, and as `obstacle` why this
    machine cannot run it, or None.

    Where it can, detections of the images are left too, `after` NMS and `before`: they are compared at home with those
    of the ONNX file. Settings: model, backend, file (its name), build (the settings of the backend's `build`), images,
    batch_size. Raises DeployError for a backend that builds nothing, and where its `build` does.
    """
    name, file = settings["backend"], out / settings["file"]
    built = build_engine(folder / settings["model"], file, name, **settings["build"])
    obstacle = backend_class(name).obstacle(built["made_for"])
    if obstacle is None:
        images = [folder / image for image in settings["images"]]
        with Predictor.open(file, name) as predictor:
            contract = predictor.contract
            found = {
                when: _detected(Predictor(predictor.backend, as_if), images, settings["batch_size"])
                for when, as_if in (("after", contract), ("before", unsuppressed(contract)))
            }
        (out / DETECTIONS).write_text(json.dumps(found), encoding="utf-8")
    return {"file": file.name, "built": built, "obstacle": obstacle}


def _detected(predictor: Predictor, images: list[Path], batch_size: int) -> list[list[dict[str, Any]]]:
    contract: Contract = predictor.contract
    found = predictor.batch(images, batch_size, contract.evaluation_score_threshold)
    return [detections.to_list(contract.classes) for detections in found]
