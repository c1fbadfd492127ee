"""COCO AP of any detectors and exported models, by one evaluator, on the same images: what is quoted is what was run.

On a target, exported models detect; what they found is scored here, as everything else is.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from deploy.accuracy import STATISTICS, Accuracy, Result, crosscheck, evaluate, evaluate_predictor
from deploy.contract import Contract
from deploy.errors import DeployError
from deploy.machine import machine
from deploy.predictor import Predictor
from deploy.tasks.validate import DETECTIONS
from deploy.work import Task
from pipeline.config import BaseConfig
from pipeline.errors import VerdictError
from pipeline.log import logger, progress
from stages.artifacts.checkpoint import Checkpoint, DistilledCheckpoint, TrainedDetector
from stages.artifacts.dataset import Dataset
from stages.artifacts.exported_model import ExportedModel
from stages.artifacts.reports import AccuracyReport, AccuracyRow
from stages.detection.detector import Detector
from stages.detection.load import build_detector
from stages.evaluation.in_memory import InMemory
from stages.evaluation.measure import BATCH, accuracy_of, contract_for
from stages.evaluation.there import BACKENDS, image_files, model_files, model_settings, sent, taken

# Reached by name at run time.
CODE = BACKENDS
_SAME = 1e-6  # two evaluators give one AP to within this


class Config(BaseConfig):
    crosscheck: bool = True
    """Let pycocotools and hotcoco both evaluate the exported files and fail where one of the 12 numbers differs."""


def run(
    config: Config,
    directory: Path,
    *,
    data: Dataset,
    checkpoints: list[TrainedDetector],
    models: list[ExportedModel],
) -> AccuracyReport:
    """One row a model. Detectors in PyTorch get the post-processing of the exported file, so that a hop in AP is a hop
    of the model and not of a threshold."""
    contract = contract_for(data)
    if ours := [model for model in models if model.foreign is None]:
        contract = before_nms(ours[0])
    for model in models:
        model.refuse_unexecuted("validate")
    rows = []
    total = len(checkpoints) + len(models)
    with progress("validate", total, "model") as advance:
        for checkpoint in checkpoints:
            detector = restored(checkpoint)
            accuracy, results = accuracy_of(detector, data, contract)
            described = {**describe(checkpoint), "runtime": InMemory(detector).identity()}
            rows.append(_row(checkpoint, described, accuracy, results, directory))
            advance(1)
        for model in models:
            with Predictor.open(model.path(model.file), model.backend) as predictor:
                accuracy, results = evaluate_predictor(
                    predictor, data.folder("val"), data.annotations("val"), batch_size=BATCH
                )
                backend = predictor.backend.identity()
            if config.crosscheck:
                accuracy = _crosschecked(results, data, model.name)
            rows.append(_row(model, describe_exported(model, backend, config), accuracy, results, directory))
            advance(1)
    for row in rows:
        logger.info("%-28s AP %.3f  AP50 %.3f", row.name, row.statistics["ap"] or 0, row.statistics["ap50"] or 0)
    return AccuracyReport(rows=tuple(rows))


def before_nms(model: ExportedModel) -> Contract:
    """The contract of an exported file as PyTorch follows it: with NMS on the host, wherever the file has it."""
    contract = Contract.from_json(json.dumps(model.contract))
    return replace(contract, nms="host", candidates=model.candidates) if contract.nms == "graph" else contract


def work(config: Config, folder: Path, *, data: Dataset, models: list[ExportedModel]) -> list[str]:
    """One task a model; a target has no torch, so checkpoints are not measured there."""
    images = image_files(data)
    settings = {"images": "inputs/images", "annotations": "inputs/annotations.json", "batch_size": BATCH}
    tasks = [Task(model.name, "validate", {**model_settings(model), **settings}) for model in models]
    inputs = {name: file for model in models for name, file in model_files(model).items()}
    return sent(folder, tasks, {**inputs, **images, "annotations.json": data.annotations("val")})


def take(
    config: Config, directory: Path, folder: Path, target: str, *, data: Dataset, models: list[ExportedModel]
) -> tuple[AccuracyReport, dict[str, Any]]:
    """Score what was detected there. Raises VerdictError where an evaluator there came to another AP."""
    results, device = taken(folder)
    rows = []
    for model in models:
        came = results[model.name]
        found: list[Result] = json.loads(came.files[DETECTIONS].read_bytes())
        accuracy = (
            _crosschecked(found, data, model.name) if config.crosscheck else evaluate(found, data.annotations("val"))
        )
        there = came.value["accuracy"]
        if there is not None and abs((there["ap"] or 0) - (accuracy.ap or 0)) > _SAME:
            raise VerdictError(
                f"validate: {model.name}: AP is {there['ap']} by {there['evaluator']} {there['version']} on {target} and "
                f"{accuracy.ap} by {accuracy.evaluator} {accuracy.version} here, of the same detections; trust neither"
            )
        described = describe_exported(model, came.value["backend"], config)
        rows.append(_row(model, {**described, "machine": came.device, "target": target}, accuracy, found, directory))
    return AccuracyReport(rows=tuple(rows)), device


def restored(checkpoint: TrainedDetector) -> Detector:
    """The detector of a checkpoint; of a distilled one the student inside, before anything is pruned."""
    detector = build_detector(checkpoint.detector, len(checkpoint.classes))
    state = load_file(checkpoint.path(checkpoint.weights))
    if isinstance(checkpoint, DistilledCheckpoint):
        state = {key.removeprefix("student."): value for key, value in state.items() if key.startswith("student.")}
    detector.load_state_dict(state)
    return detector.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def describe(checkpoint: TrainedDetector) -> dict[str, Any]:
    """What a row says of a checkpoint beside its numbers."""
    file = checkpoint.path(checkpoint.weights)
    pruned = isinstance(checkpoint, Checkpoint) and checkpoint.proof is not None
    kind = "distilled" if isinstance(checkpoint, DistilledCheckpoint) else "pruned" if pruned else "trained"
    return {
        "kind": kind,
        "source": checkpoint.source,
        "backend": f"torch {torch.__version__}",
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "parameters": checkpoint.parameters,
        "bytes": file.stat().st_size,
        "crosschecked": False,
    }


def describe_exported(model: ExportedModel, backend: dict[str, Any], config: Config) -> dict[str, Any]:
    """What a row says of an exported model beside its numbers."""
    return {
        "kind": "exported",
        "source": model.source,
        "backend": f"{backend['runtime']} {backend['version']}",
        "runtime": backend,
        "sha256": model.sha256,
        "parameters": model.parameters,
        "bytes": model.bytes,
        "crosschecked": config.crosscheck,
    }


def _crosschecked(results: list[dict[str, Any]], data: Dataset, name: str) -> Accuracy:
    try:
        return crosscheck(results, data.annotations("val"))
    except DeployError as problem:
        raise VerdictError(f"validate: {name}: the two evaluators disagree: {problem}") from problem


def _row(
    made: TrainedDetector | ExportedModel,
    described: dict[str, Any],
    accuracy: Accuracy,
    results: list[dict[str, Any]],
    directory: Path,
) -> AccuracyRow:
    file = directory / f"{made.name or made.key}.json"
    file.write_text(json.dumps(results))
    values = dataclasses.asdict(accuracy)
    return AccuracyRow(
        name=made.name,
        key=made.key,
        statistics={name: values[name] for name in STATISTICS},
        per_class=accuracy.per_class,
        evaluator=f"{accuracy.evaluator} {accuracy.version}",
        images=accuracy.images,
        results=file.name,
        **{"machine": machine(), **described},
    )
