"""AP of one YOLO on the same images, by Ultralytics' own validation and by ours.

    python benchmarks/yolo_accuracy.py yolov8n model.safetensors IMAGES ANNOTATIONS.json --size 128 [--out RESULT.json]

Both get the same weights, canvas, thresholds and limit; whatever NMS the network needs is each one's own. Ultralytics
reads and letterboxes the images itself: give images that fill the canvas, where ours and theirs differ by the JPEG decoder
alone; else ours lie top left and theirs in the middle. Its detections are also scored by COCO's evaluator, since its own
metric counts AP in another way. Needs the extra `ultralytics` (AGPL-3.0).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import yaml

from deploy.accuracy import evaluate, evaluate_predictor
from deploy.contract import Contract
from deploy.image import ImageSpec
from deploy.machine import machine
from deploy.predictor import Predictor
from stages.detection.detectors.yolo import YOLO
from stages.detection.load import load_detector
from stages.detection.ultralytics_network import described
from stages.evaluation.in_memory import InMemory

GREY = (114, 114, 114)
CONFIDENCE, OVERLAP, LIMIT, CANDIDATES = 0.001, 0.7, 300, 3000  # Ultralytics' for validation, and candidates enough


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("weights", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("annotations", type=Path)
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    document = json.loads(asked.annotations.read_bytes())
    categories = sorted(document["categories"], key=lambda one: int(one["id"]))
    detector = load_detector({"name": "yolo", "model": asked.model}, len(categories), asked.weights)
    assert isinstance(detector, YOLO)
    ours = by_us(detector, categories, asked)
    with tempfile.TemporaryDirectory() as folder:
        own, theirs = by_them(detector, document, categories, asked, Path(folder))
    found = {
        "ours": ours,
        "Ultralytics' detections": theirs,
        "difference": {name: ours[name] - theirs[name] for name in ours},
        "Ultralytics' own metric": own,
    }
    for who, numbers in found.items():
        print(f"{who:26}" + "".join(f"{name:>6} {value:8.5f}" for name, value in numbers.items()))
    if asked.out:
        command = f"benchmarks/yolo_accuracy.py {asked.model}, {len(document['images'])} images, --size {asked.size}"
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        head = {"date": now, "command": command, "machine": machine(), "load": os.getloadavg()}
        asked.out.write_text(json.dumps(head | found, indent=1) + "\n", encoding="utf-8")
    return 0


def by_us(detector: YOLO, categories: list[dict[str, Any]], asked: argparse.Namespace) -> dict[str, float]:
    """COCO's AP and AP50 of what our predictor finds."""
    contract = Contract(
        image=ImageSpec(asked.size, asked.size, GREY),
        classes=tuple(one["name"] for one in categories),
        category_ids=tuple(one["id"] for one in categories),
        candidates=CANDIDATES,
        evaluation_score_threshold=CONFIDENCE,
        nms_iou=OVERLAP,
        max_detections=LIMIT,
        nms="host" if detector.needs_nms else "none",
    )
    with Predictor(InMemory(detector, CANDIDATES), contract) as predictor:
        accuracy = evaluate_predictor(predictor, asked.images, asked.annotations, evaluator="pycocotools")[0]
    return {"ap": accuracy.ap or 0.0, "ap50": accuracy.ap50 or 0.0}


def by_them(
    detector: YOLO,
    document: dict[str, Any],
    categories: list[dict[str, Any]],
    asked: argparse.Namespace,
    folder: Path,
) -> tuple[dict[str, float], dict[str, float]]:
    """Its own mAP, and COCO's AP of the same detections. `folder` gets its data set and all that it writes."""
    data = write_data(document, categories, asked.images, folder)
    os.environ.update({"YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false", "YOLO_CONFIG_DIR": str(folder)})
    from ultralytics.models.yolo.detect import DetectionValidator
    from ultralytics.nn.tasks import DetectionModel

    model = DetectionModel(described(asked.model), nc=len(categories), verbose=False)
    last = len(detector.body)
    state = {
        key.replace("head.", f"model.{last}.", 1)
        if key.startswith("head.")
        else key.replace("body.", "model.", 1): value
        for key, value in detector.state_dict().items()
    }
    missing = model.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    assert all(".dfl." in key for key in missing.missing_keys)
    model.names = {label: one["name"] for label, one in enumerate(categories)}
    settings = {
        "data": str(data), "imgsz": asked.size, "batch": 8, "conf": CONFIDENCE, "iou": OVERLAP, "max_det": LIMIT,
        "rect": False, "save_json": True, "plots": False, "workers": 0, "device": "cpu", "verbose": False,
        "project": str(folder), "name": "val", "nms": None if detector.needs_nms else False,
    }  # fmt: skip
    validator = DetectionValidator(args=settings)
    validator(model=model.eval())
    ids = {Path(one["file_name"]).name: one["id"] for one in document["images"]}
    results = [
        {
            "image_id": ids[one["file_name"]],
            "category_id": categories[one["category_id"] - 1]["id"],  # it counts them from 1
            "bbox": one["bbox"],
            "score": one["score"],
        }
        for one in validator.jdict
    ]
    accuracy = evaluate(results, asked.annotations, "pycocotools")
    box = validator.metrics.box
    own = {"ap": float(box.map), "ap50": float(box.map50)}
    return own, {"ap": accuracy.ap or 0.0, "ap50": accuracy.ap50 or 0.0}


def write_data(document: dict[str, Any], categories: list[dict[str, Any]], images: Path, folder: Path) -> Path:
    """The images and their objects as Ultralytics reads them; its data.yaml."""
    label = {one["id"]: number for number, one in enumerate(categories)}
    for kind in ("images", "labels"):
        (folder / kind).mkdir()
    for image in document["images"]:
        name, size = Path(image["file_name"]).name, (image["width"], image["height"])
        (folder / "images" / name).symlink_to((images / image["file_name"]).resolve())
        lines = []
        for one in document["annotations"]:
            if one["image_id"] == image["id"]:
                x, y, w, h = one["bbox"]
                shares = (x + w / 2) / size[0], (y + h / 2) / size[1], w / size[0], h / size[1]
                lines.append(" ".join([str(label[one["category_id"]]), *(f"{share:.8f}" for share in shares)]))
        (folder / "labels" / name).with_suffix(".txt").write_text("\n".join(lines), encoding="utf-8")
    file = folder / "data.yaml"
    names = {number: one["name"] for number, one in enumerate(categories)}
    file.write_text(yaml.safe_dump({"path": str(folder), "train": "images", "val": "images", "names": names}))
    return file


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
