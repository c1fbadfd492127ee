"""What a model detects in all images of a COCO dataset; its AP too, where an evaluator is installed.

The detections are what counts: they go home and are scored there, by the evaluators that score everything else. AP is
told here as well so that whoever is at the device sees it, and must come out the same at home.
"""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from deploy.accuracy import EVALUATORS, detect_all, evaluate
from deploy.predictor import Predictor

DETECTIONS = "detections.json"


def do(settings: dict[str, Any], folder: Path, out: Path) -> dict[str, Any]:
    """Leaves COCO results; returns what the `backend` says it is, and the `accuracy` or None.

    Settings: model, backend, runtime (the backend's settings), images, annotations, batch_size.
    """
    images, annotations = folder / settings["images"], folder / settings["annotations"]
    with Predictor.open(folder / settings["model"], settings["backend"], **settings["runtime"]) as predictor:
        found = detect_all(predictor, images, annotations, settings["batch_size"])
        backend = predictor.backend.identity()
    (out / DETECTIONS).write_text(json.dumps(found), encoding="utf-8")
    evaluator = next((name for name in EVALUATORS if find_spec(name)), None)
    accuracy = evaluate(found, annotations, evaluator).to_dict() if evaluator else None
    ap = f"AP {accuracy['ap']}, by {evaluator}" if accuracy else "no evaluator is installed: AP is computed at home"
    print(f"{len(found)} detections; {ap}", file=sys.stderr)
    return {"backend": backend, "accuracy": accuracy}
