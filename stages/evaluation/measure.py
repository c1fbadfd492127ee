"""AP of a PyTorch detector by the code that will measure the exported file."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from deploy.accuracy import Accuracy, evaluate_predictor
from deploy.contract import Contract
from deploy.predictor import Predictor
from stages.artifacts.dataset import Dataset
from stages.detection.detector import Detector
from stages.evaluation.in_memory import InMemory

BATCH = 8  # images inferred together when measuring AP


def contract_for(data: Dataset, candidates: int = 1000, **settings: Any) -> Contract:
    """The contract of a detector of this dataset: canvas, classes, thresholds. `settings` are the Contract's."""
    defaults: dict[str, Any] = {"evaluation_score_threshold": 0.01}
    return Contract(
        image=data.image_spec(),
        classes=data.classes,
        category_ids=data.category_ids,
        candidates=candidates,
        **(defaults | settings),
    )


def followed_by(detector: Detector, contract: Contract) -> Contract:
    """The contract as this detector in PyTorch follows it: with NMS by the host, or by nobody where it needs none."""
    return replace(contract, nms="host" if detector.needs_nms else "none")


def accuracy_of(
    detector: Detector, data: Dataset, contract: Contract | None = None, evaluator: str = "hotcoco"
) -> tuple[Accuracy, list[dict[str, Any]]]:
    """The 12 COCO statistics on the validation split, and the COCO results they come from."""
    contract = followed_by(detector, contract or contract_for(data))
    with Predictor(InMemory(detector, contract.candidates), contract) as predictor:
        return evaluate_predictor(
            predictor, data.folder("val"), data.annotations("val"), batch_size=BATCH, evaluator=evaluator
        )


def average_precision(detector: nn.Module, data: Dataset) -> dict[str, float]:
    """AP and AP50 for the log of a training."""
    assert isinstance(detector, Detector)
    accuracy, _ = accuracy_of(detector, data)
    return {"val/ap": accuracy.ap or 0.0, "val/ap50": accuracy.ap50 or 0.0}
