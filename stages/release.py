"""The bundle an edge program loads: the exported file, its contract, what was measured on it, and a model card."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from deploy import bundle
from deploy.contract import Contract
from deploy.predictor import Predictor
from pipeline.config import BaseConfig
from pipeline.errors import UserError
from pipeline.log import logger
from stages.artifacts.bundle import Bundle
from stages.artifacts.dataset import Dataset
from stages.artifacts.exported_model import ExportedModel
from stages.artifacts.reports import AccuracyReport, AccuracyRow, LatencyReport, LatencyRow, Report
from stages.data.coco import CocoSplit

FOLDER = "bundle"
# Reached by name at run time.
CODE = tuple(f"deploy.backends.{name}" for name in ("onnxruntime", "openvino", "tensorrt", "tensorrt_rtx"))


class Config(BaseConfig):
    name: str = "detector"
    """Name of the model, on its card and in release.json."""
    licence: str = "unknown"
    """Licence of the weights, as an SPDX identifier; yours to say: it depends on the data they were trained on."""
    sample: bool = False
    """Put one validation image with its detections into the bundle, so that `deploy verify` can reproduce them. Off by
    default: the image may not be yours to publish."""


def check(config: Config, wired: Mapping[str, Any]) -> Iterable[str]:
    """One bundle holds one file, and what was measured on it."""
    names = [node.name for node in wired.get("models", ())]
    if len(names) > 1:
        yield f"a bundle holds one model, {len(names)} are wired ({', '.join(names)}); name one: needs: {{models: {names[0]}}}"
    if not names:
        yield "a bundle holds an exported model and none is wired; add a stage that uses export"
    if not wired.get("accuracy"):
        yield "a bundle says what AP its file has and nothing measures it; add a stage that uses validate"


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
    """Bundle the one model. Every report guards it: with a failed gate this stage does not run."""
    (model,) = models
    model.refuse_unexecuted("release")
    contract = Contract.from_json(json.dumps(model.contract))
    measured = next((row for part in accuracy for row in part.rows if row.sha256 == model.sha256), None)
    if measured is None:
        raise UserError(
            f"release: no AP was measured on {model.name} (sha256 {model.sha256[:12]}); wire its validate stage"
        )
    timed = next((row for part in latency for row in part.rows if row.sha256 == model.sha256), None)
    sample = first_sample(model, data, contract) if config.sample else None
    made = bundle.write(
        directory / FOLDER,
        model.path(model.file),
        contract,
        {
            "name": config.name,
            "licence": config.licence,
            "accuracy": measured.model_dump(mode="json", exclude={"results"}),
            "latency": timed.model_dump(mode="json") if timed else None,
            "provenance": provenance(model, data, reports),
        },
        card(config, model, data, contract, measured, timed),
        sample,
    )
    logger.info("bundle: %s", ", ".join(sorted(made.release["files"])))
    return Bundle(folder=FOLDER, files={name: digest["sha256"] for name, digest in made.release["files"].items()})


def first_sample(model: ExportedModel, data: Dataset, contract: Contract) -> tuple[Path, Any]:
    """The first validation image on which the file finds something, and what it finds."""
    with Predictor.open(model.path(model.file), model.backend) as predictor:
        for image in CocoSplit(data.folder("val"), data.annotations("val")).files:
            (found,) = predictor([image])
            if len(found):
                return image, found
    raise UserError(
        f"release: the model finds nothing above {contract.score_threshold} in any validation image, so there is no "
        "sample; lower export's score_threshold, or train longer"
    )


def provenance(model: ExportedModel, data: Dataset, reports: list[Report]) -> dict[str, Any]:
    """How the file came about, as far as this run knows it."""
    made = model.provenance
    return {
        "model_key": model.key,
        "checkpoint_key": model.source,
        "report_keys": [report.key for report in reports],
        "gates_passed": {gate.name: gate.measured for report in reports for gate in report.gates},
        "dataset_fingerprint": data.fingerprint,
        "commit": made.get("commit"),
        "versions": made.get("versions"),
        "adopted_from": made.get("adopted_from"),
    }


def card(
    config: Config,
    model: ExportedModel,
    data: Dataset,
    contract: Contract,
    measured: AccuracyRow,
    timed: LatencyRow | None,
) -> str:
    """The model card, as the Hugging Face hub reads it."""
    ap, ap50 = measured.statistics["ap"], measured.statistics["ap50"]
    shown = ", ".join(data.classes[:12]) + (", ..." if len(data.classes) > 12 else "")
    size, pad = f"{contract.image.height}x{contract.image.width}", list(contract.image.pad_rgb)
    lines = [
        "---",
        f"license: {config.licence}",
        "pipeline_tag: object-detection",
        "library_name: onnx",
        "---",
        f"# {config.name}",
        "",
        f"An object detector for {len(data.classes)} classes ({shown}).",
        f"ONNX, {model.precision}, {model.parameters:,} parameters, {model.flops / 1e9:.2f} GFLOPs an image, "
        f"{model.bytes / 1e6:.2f} MB.",
        "",
        "## Measured on this very file",
        "",
        f"- AP {number(ap)}, AP50 {number(ap50)} (COCO, {measured.images} validation images, {measured.evaluator}, "
        f"{measured.backend})",
    ]
    if timed:
        total = timed.steps["end_to_end"]
        doubt = "" if timed.reliable else " - UNRELIABLE: " + "; ".join(timed.evidence["reasons"])
        lines.append(
            f"- milliseconds of one image, file to detections: p50 {number(total['p50'], 2)}, "
            f"p99 {number(total['p99'], 2)}, on {timed.machine['cpu']}, {timed.threads} threads{doubt}"
        )
    lines += [
        f"- parity with {model.parity.reference if model.parity else 'nothing'}: "
        f"{model.parity.sentence if model.parity else model.not_executed}",
        "",
        "## Use",
        "",
        "```sh",
        "pip install '.[cpu]'   # in the Headstart repository",
        "deploy predict . image.jpg",
        "deploy verify .",
        "```",
        "",
        f"Images: RGB uint8, resized with antialias to fit {size} (height x width), placed top left, the rest filled with "
        f"{pad}. The graph normalises and decodes; NMS at IoU {contract.nms_iou} is done by the {contract.nms}.",
        f"Deployment threshold {contract.score_threshold}; AP was measured from {contract.evaluation_score_threshold}.",
        "",
        "## Data",
        "",
        f"{data.train.image_count} training and {data.val.image_count} validation images. {data.attribution}".strip(),
        "",
    ]
    return "\n".join(lines)


def number(value: float | None, digits: int = 3) -> str:
    """A measured number, or that there is none."""
    return "not measured" if value is None else f"{value:.{digits}f}"
