"""The bundle an edge program loads: exported files for one device or several, what was measured on them, a model card."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from deploy import sidecar
from deploy.contract import Contract
from deploy.errors import DeployError
from deploy.manifest import Model
from deploy.predictor import Predictor
from deploy.release import Sample, write
from pipeline.config import BaseConfig
from pipeline.errors import UserError
from pipeline.log import logger
from stages.artifacts.bundle import Bundle
from stages.artifacts.dataset import Dataset
from stages.artifacts.exported_model import ExportedModel
from stages.artifacts.reports import AccuracyReport, AccuracyRow, LatencyReport, Report
from stages.data.coco import CocoSplit
from stages.detection.planned import planned_licences
from stages.evaluation.there import BACKENDS
from stages.exporting.card import card
from stages.exporting.licence import UNKNOWN, settled

FOLDER = "bundle"
# Reached by name at run time.
CODE = BACKENDS


class Config(BaseConfig):
    name: str = "detector"
    """Name of the model, on its card and in release.json."""
    licence: str = UNKNOWN
    """Licence of the weights, as an SPDX identifier; yours to say: it depends on the data they were trained on. If it is
    not given, that of a detector in the chain that brings one (AGPL-3.0 of a yolo)."""
    licence_reason: str = ""
    """Why `licence` may be another than a detector of the chain brings, as the number of a commercial licence; it is
    written on the card."""
    sample: bool = False
    """Put one validation image with its detections into the bundle, so that `deploy verify` can reproduce them, and the
    reference's input and raw outputs on it, for runtimes in other languages. Off by default: the image may not be yours
    to publish."""
    rebuild: str = ""
    """The command that makes a file for another device, told where a file of the bundle is refused; of an engine that of
    `deploy build` if not given."""


def check(config: Config, wired: Mapping[str, Any]) -> Iterable[str]:
    """A bundle holds files, and what was measured on them."""
    if not wired.get("models"):
        yield "a bundle holds exported models and none is wired; add a stage that uses export"
    brought = {name for node in wired.get("models", ()) for name in planned_licences(node)}
    try:
        settled(config.licence, config.licence_reason, brought)
    except ValueError as problem:
        yield str(problem)
    if not wired.get("accuracy"):
        yield "a bundle says what AP its files have and nothing measures it; add a stage that uses validate"


def run(
    config: Config,
    directory: Path,
    *,
    data: Dataset,
    models: list[ExportedModel],
    accuracy: list[AccuracyReport],
    latency: list[LatencyReport],
    reports: list[Report],
) -> Bundle:
    """Bundle the models, the reference first. Every report guards them: with a failed gate this stage does not run."""
    models = sorted(models, key=lambda one: (one.backend != "onnxruntime", one.precision != "fp32"))
    described = [(one, released(one, file, accuracy, latency, config)) for one, file in named(models)]
    brought = {name for model in models for name in model.licences}
    try:
        licence = settled(config.licence, config.licence_reason, brought)
    except ValueError as problem:
        raise UserError(f"release: {problem}") from problem
    sample = first_sample(described, data) if config.sample else None
    made = write(
        directory / FOLDER,
        [(one.path(one.file), model) for one, model in described],
        {"name": config.name, "licence": licence.name, "provenance": provenance(models, data, reports)},
        card(config.name, licence, described, data),
        sample,
    )
    logger.info("bundle: %s", ", ".join(sorted(made.release["files"])))
    return Bundle(folder=FOLDER, files={name: digest["sha256"] for name, digest in made.release["files"].items()})


def named(models: Sequence[ExportedModel]) -> list[tuple[ExportedModel, str]]:
    """Each model's file name in the bundle: model.onnx for one alone, of several the names of their stages."""
    if len(models) == 1:
        return [(models[0], f"model{Path(models[0].file).suffix}")]
    return [(one, re.sub(r"[^\w.-]+", "_", one.name).strip("_") + Path(one.file).suffix) for one in models]


def released(
    model: ExportedModel, file: str, accuracy: list[AccuracyReport], latency: list[LatencyReport], config: Config
) -> Model:
    """What release.json says of a model. Raises UserError when no AP was measured on this very file."""
    measured = accuracy_of(model, accuracy)
    timed = [row for part in latency for row in part.rows if row.sha256 == model.sha256]
    engine = sidecar.peek(model.path(model.file))
    return Model(
        file=file,
        sha256=model.sha256,
        backend=model.backend,
        precision=model.precision,
        contract=Contract.from_json(json.dumps(model.contract)),
        made_for=model.made_for,
        accuracy=measured.model_dump(mode="json", exclude={"results"}),
        latency=tuple(row.model_dump(mode="json", exclude={"calls"}) for row in timed),
        rebuild=config.rebuild or (engine.command if engine else ""),
    )


def accuracy_of(model: ExportedModel, accuracy: list[AccuracyReport]) -> AccuracyRow:
    """The row of this very file. Raises UserError when there is none."""
    for part in accuracy:
        for row in part.rows:
            if row.sha256 == model.sha256:
                return row
    raise UserError(
        f"release: no AP was measured on {model.name} (sha256 {model.sha256[:12]}); wire its validate stage"
    )


def first_sample(models: Sequence[tuple[ExportedModel, Model]], data: Dataset) -> Sample:
    """The first validation image on which the reference finds something, and what each model that runs here finds."""
    with ExitStack() as stack:
        predictors: dict[str, Predictor] = {}
        for one, model in models:
            try:
                opened = Predictor.open(one.path(one.file), model.backend)
            except DeployError as problem:  # an engine for another machine
                if not predictors:
                    raise
                logger.warning("sample: what %s finds in it is not recorded: %s", model.file, problem)
                continue
            predictors[model.file] = stack.enter_context(opened)
        reference = next(iter(predictors.values()))
        for image in CocoSplit(data.folder("val"), data.annotations("val")).files:
            if len(reference([image])[0]):
                taken = Sample.take(image, predictors)
                found = {name: one for name, one in taken.detections.items() if len(one)}
                return replace(taken, detections=found)
    raise UserError(
        f"release: the model finds nothing above {reference.contract.score_threshold} in any validation image, so there "
        "is no sample; lower export's score_threshold, or train longer"
    )


def provenance(models: Sequence[ExportedModel], data: Dataset, reports: list[Report]) -> dict[str, Any]:
    """How the files came about, as far as this run knows it; the reference's by themselves, the others' by their keys."""
    reference, made = models[0], models[0].provenance
    return {
        "model_key": reference.key,
        "model_keys": {one.name: one.key for one in models},
        "checkpoint_key": reference.source,
        "report_keys": [report.key for report in reports],
        "gates_passed": {gate.name: gate.measured for report in reports for gate in report.gates},
        "dataset_fingerprint": data.fingerprint,
        "licences": sorted({name for one in models for name in one.licences}),
        "commit": made.get("commit"),
        "versions": made.get("versions"),
        "adopted_from": made.get("adopted_from"),
    }
