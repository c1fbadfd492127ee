"""Judging attempts at a file on training images that nothing was calibrated on: AP, detections, and how far they agree."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deploy.accuracy import Result, evaluate_predictor
from deploy.contract import Contract
from deploy.detections import Detections
from deploy.parity import Tolerance, compare
from deploy.predictor import Predictor
from pipeline.errors import UserError
from stages.artifacts.exported_model import ParityRecord

BATCH = 8


@dataclass(frozen=True)
class HeldOut:
    """Images with their COCO annotations; `folder` is where file names start."""

    images: tuple[Path, ...]
    folder: Path
    annotations: Path

    def accuracy(self, file: Path) -> tuple[float, list[Result]]:
        """AP of an exported file, and the COCO results it comes from. Raises UserError where nothing is annotated."""
        with Predictor.open(file) as predictor:
            accuracy, results = evaluate_predictor(predictor, self.folder, self.annotations, batch_size=BATCH)
        if accuracy.ap is None:
            raise UserError("quantize: no object is annotated on the held-out images; hold out more")
        return accuracy.ap, results

    def detections(self, file: Path, count: int | None = None, threshold: float | None = None) -> list[Detections]:
        """What a file finds in the first `count` images; above the contract's threshold for AP unless one is given."""
        with Predictor.open(file) as predictor:
            least = predictor.contract.evaluation_score_threshold if threshold is None else threshold
            return list(predictor.batch(self.images[:count], BATCH, least))

    def found_again(self, before: Path, after: Path, contract: Contract, name: str) -> ParityRecord:
        """Which detections of one file the other has too, at the deployment threshold. Eight bits have no tolerance:
        what decides is the budget of AP, which this file has kept."""
        threshold = contract.score_threshold
        a, b = (self.detections(file, threshold=threshold) for file in (before, after))
        parity = compare(a, b, Tolerance(math.inf, 0.0), threshold)
        same = parity.matched - parity.label_mismatches
        return ParityRecord.of(
            parity,
            name,
            unmatched=parity.unmatched + parity.excused,
            passed=True,
            sentence=f"{same} of {sum(map(len, a))} detections above {threshold:g} in {len(a)} held-out training images were "
            f"found again, {sum(map(len, b)) - same} are new; boxes moved by up to {parity.max_box_px:.2g} px, scores by up to "
            f"{parity.max_score:.2g}",
        )


def told(names: Sequence[str], most: int = 3) -> str:
    """`a, b and 4 more`."""
    shown = ", ".join(names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
