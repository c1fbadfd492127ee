"""How good the teachers are, before hours are spent on learning from them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from deploy.accuracy import evaluate_predictor
from deploy.predictor import Predictor
from pipeline.digest import write_atomically
from pipeline.errors import UserError
from pipeline.log import logger
from stages.artifacts.checkpoint import Checkpoint, Teacher
from stages.artifacts.dataset import Dataset
from stages.detection.detector import Detector
from stages.detection.load import checksum
from stages.evaluation.in_memory import InMemory
from stages.evaluation.measure import BATCH, contract_for, followed_by


def sampled_ap(detector: Detector, data: Dataset, images: int) -> float | None:
    """COCO AP, from 0 to 1, on `images` validation images drawn by seed 0, on all where there are no more; None where
    there is no object on them."""
    document = json.loads(data.annotations("val").read_bytes())
    rows = np.sort(np.random.default_rng(0).permutation(len(document["images"]))[:images])
    document["images"] = [document["images"][row] for row in rows]
    kept = {image["id"] for image in document["images"]}
    document["annotations"] = [one for one in document["annotations"] if one["image_id"] in kept]
    contract = followed_by(detector, contract_for(data))
    with tempfile.TemporaryDirectory() as folder, Predictor(InMemory(detector, contract.candidates), contract) as run:
        annotations = Path(folder) / "sample.json"
        annotations.write_text(json.dumps(document))
        return evaluate_predictor(run, data.folder("val"), annotations, batch_size=BATCH)[0].ap


def examined(
    checkpoints: Sequence[Checkpoint],
    detectors: Mapping[str, Detector],
    data: Dataset,
    images: int,
    least: float,
    notes: Path,
) -> tuple[Teacher, ...]:
    """Each teacher with its checksum and its AP on a sample of `images` validation images; `detectors` by node name.

    What was measured is kept in the file `notes`, so that a training that goes on does not measure again. Raises
    UserError where a teacher has less AP than `least`.
    """
    known: dict[str, float | None] = json.loads(notes.read_bytes()) if notes.is_file() else {}
    images = min(images, data.val.image_count)
    found = []
    for one in checkpoints:
        detector = detectors[one.name]
        if images and one.name not in known:
            known[one.name] = sampled_ap(detector, data, images)
            write_atomically(notes, json.dumps(known).encode())
        ap = known.get(one.name)
        if images:
            said = "no AP, for want of objects" if ap is None else f"{100 * ap:.1f} AP"
            logger.info("teacher %s: %s on a sample of %d validation images", one.name, said, images)
        if least and (ap or 0.0) < least:
            raise UserError(
                f"distill: the teacher {one.name} has {100 * (ap or 0.0):.1f} AP on a sample of {images} validation images, "
                f"min_teacher_ap asks for {100 * least:.1f}; train it longer, wire a better one, or lower min_teacher_ap"
            )
        found.append(
            Teacher(
                name=one.name, key=one.key, checksum=checksum(detector), ap=ap, images=images, licences=one.licences
            )
        )
    return tuple(found)
