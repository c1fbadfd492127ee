"""Let an exported model, ours or a foreign one, label training images: pseudo labels, which extend a dataset's annotations.

An ONNX file gives boxes and no features, so this is how one teaches. Validation images and their labels are never touched.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from deploy.detections import Detections
from deploy.parity import overlaps
from deploy.predictor import Predictor
from pipeline.config import BaseConfig
from pipeline.errors import UserError, VerdictError
from pipeline.log import logger, progress
from stages.artifacts.dataset import Dataset
from stages.artifacts.exported_model import ExportedModel
from stages.evaluation.measure import BATCH
from stages.evaluation.there import BACKENDS

CODE = BACKENDS  # reached by name at run time


class Config(BaseConfig):
    score: float = Field(default=0.5, gt=0, le=1)
    """A detection above it becomes a label; what is below is left as background, so too high costs as much as too low."""
    images: Literal["unlabelled", "all"] = "unlabelled"
    """Training images without any annotation, or all of them: there a detection is added where no annotation of its class
    overlaps it."""
    overlap: float = Field(default=0.5, gt=0, le=1)
    """IoU with an annotation of the same class (a crowd's too, by the share of the detection inside) from which a
    detection is that object."""


def run(config: Config, directory: Path, *, model: ExportedModel, data: Dataset) -> Dataset:
    """The same dataset with more training annotations; each new one is marked with `pseudo_score`."""
    model.refuse_unexecuted("pseudo_label")
    if model.classes != data.classes:
        raise UserError(f"pseudo_label: {model.name} has other classes than the dataset; make it for this dataset")
    document = json.loads(data.annotations("train").read_bytes())
    there: dict[int, list[dict[str, Any]]] = {record["id"]: [] for record in document["images"]}
    for annotation in document["annotations"]:
        there[annotation["image_id"]].append(annotation)
    records = [one for one in document["images"] if config.images == "all" or not there[one["id"]]]
    if not records:
        raise UserError(
            "pseudo_label: every training image has annotations; set images: all, or add images without any"
        )
    fresh = max((one["id"] for one in document["annotations"]), default=0) + 1
    made: list[dict[str, Any]] = []
    files = [data.folder("train") / record["file_name"] for record in records]
    with (
        Predictor.open(model.path(model.file), model.backend) as predictor,
        progress("label", len(files), "image") as tick,
    ):
        for record, found in zip(records, predictor.batch(files, BATCH, config.score), strict=True):
            new = annotations_of(found, record, there[record["id"]], data, config.overlap)
            made += [{**one, "id": fresh + len(made) + place} for place, one in enumerate(new)]
            tick(1)
    if not made:
        raise VerdictError(
            f"pseudo_label: nothing new is found above {config.score} in {len(files)} images; lower score"
        )
    document["annotations"] += made
    text = json.dumps(document)
    (directory / "train.json").write_text(text, encoding="utf-8")
    (directory / "val.json").write_bytes(data.annotations("val").read_bytes())
    finding = (
        f"{len(made)} of {len(document['annotations'])} training boxes are pseudo labels: what {model.name} found above "
        f"{config.score:g} in {len(files)} training images; nobody looked at them"
    )
    logger.info("%s", finding)
    counts = dict(data.train.boxes_per_class)
    names = dict(zip(data.category_ids, data.classes, strict=True))
    for one in made:
        counts[names[one["category_id"]]] += 1
    train = {"images": str(data.folder("train")), "annotations": "train.json", "boxes_per_class": counts}
    val = {"images": str(data.folder("val")), "annotations": "val.json"}
    return data.model_copy(
        update={
            "train": data.train.model_copy(update={**train, "box_count": data.train.box_count + len(made)}),
            "val": data.val.model_copy(update=val),
            "fingerprint": hashlib.sha256(f"{data.fingerprint} {text}".encode()).hexdigest(),
            "problems": (*data.problems, finding),
        }
    )


def annotations_of(
    found: Detections,
    record: Mapping[str, Any],
    there: Sequence[Mapping[str, Any]],
    data: Dataset,
    overlap: float,
) -> list[dict[str, Any]]:
    """COCO annotations, without an id, of the detections in one image that none of its annotations shows already."""
    new = []
    for box, score, label in zip(found.boxes_xyxy, found.scores, found.labels, strict=True):
        category = data.category_ids[int(label)]
        known = [one for one in there if one["category_id"] == category]
        if any(_shows(one, box) >= overlap for one in known):
            continue
        x1, y1, x2, y2 = (float(side) for side in box)
        new.append(
            {
                "image_id": record["id"],
                "category_id": category,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": (x2 - x1) * (y2 - y1),
                "iscrowd": 0,
                "pseudo_score": float(score),
            }
        )
    return new


def _shows(annotation: Mapping[str, Any], box_xyxy: NDArray[np.float32]) -> float:
    """IoU of a box with an annotation; of a crowd the share of the box that is inside, as COCO counts it."""
    x, y, width, height = annotation["bbox"]
    iou = overlaps(np.asarray([[x, y, x + width, y + height]], np.float32), box_xyxy[None])
    if not annotation["iscrowd"]:
        return float(iou[0, 0])
    sides = np.minimum([x + width, y + height], box_xyxy[2:]) - np.maximum([x, y], box_xyxy[:2])
    return float(np.clip(sides, 0, None).prod() / (box_xyxy[2:] - box_xyxy[:2]).prod())
