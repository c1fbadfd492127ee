"""Take an ONNX detector that was made elsewhere, by a description of what it wants and gives: measured and shipped as ours."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from pydantic import Field

from deploy.contract import Contract
from deploy.image import ImageSpec, decode
from deploy.parity import Tolerance
from pipeline.config import BaseConfig, Choice, ExternalFile
from pipeline.errors import UserError, VerdictError
from pipeline.log import logger
from stages.artifacts.dataset import Dataset
from stages.artifacts.exported_model import ExportedModel, ForeignFile, ParityRecord
from stages.data.coco import CocoSplit
from stages.exporting.adapter import Activation, Adapter, InputConfig
from stages.exporting.agreement import Reference
from stages.exporting.as_given import AsGiven, implausible
from stages.exporting.class_names import COCO80, matched
from stages.exporting.foreign import Foreign, for_any_batch, precision_of, read
from stages.exporting.graph_flops import graph_flops
from stages.exporting.layout import Layout
from stages.exporting.nms import with_nms_inside
from stages.exporting.tracing import carried

CODE = ("deploy.backends.onnxruntime",)  # reached by name at run time


class Config(BaseConfig):
    model: ExternalFile
    """The ONNX file."""
    classes: Literal["coco80"] | tuple[str, ...]
    """Names of the model's classes in its order, or coco80: the 80 of COCO, as YOLO's kind has them."""
    rename: dict[str, str] = Field(default_factory=dict)
    """Name of a class in the dataset to its name in `classes`, where they differ."""
    unknown: Literal["refuse", "ignore"] = "refuse"
    """A class of the dataset that the model does not know ends the stage, or is never found and counts in AP as such."""
    input: InputConfig
    """How an image becomes its input."""
    layout: Choice[Layout]
    """What its outputs mean."""
    activation: Activation
    """What makes probabilities of its scores (sigmoid of its objectness too); none where the file does it itself."""
    per_box: Literal["every", "best"] = "every"
    """Whether a box may be found for every class, as AP is usually measured, or for its best one alone."""
    nms: Literal["host", "graph", "none"]
    """Who suppresses duplicates: numpy after the graph, a node put into it, or nobody, where the model gives none."""
    nms_iou: float = Field(default=0.5, gt=0, le=1)
    """Overlap above which the weaker of two boxes of a class goes."""
    candidates: int = Field(default=1000, ge=1)
    """Boxes an image before NMS; fewer where the model gives fewer."""
    score_threshold: float = Field(default=0.3, ge=0, le=1)
    """Deployment threshold, written into the contract. AP is measured far below it."""
    evaluation_score_threshold: float = Field(default=0.01, ge=0, le=1)
    """Scores from which AP is measured; 0.01 is that of our own exports."""
    max_detections: int = Field(default=100, ge=1)
    """Detections kept an image."""
    parity_images: int = Field(default=32, ge=2)
    """Validation images on which the adapted file must find what the given one does, decoded in numpy."""
    parity_box_px: float = Field(default=0.5, gt=0)
    """Largest difference of a box edge, in pixels of the original image."""
    parity_score: float = Field(default=1e-3, gt=0)
    """Largest difference of a score."""


def run(config: Config, directory: Path, *, data: Dataset) -> ExportedModel:
    """The file with our nodes at both ends and our contract inside; parity with the file as it was given decides."""
    foreign, layout = described(config)
    match = matched(names_of(config), data.classes, config.rename, config.unknown == "ignore")
    if match.unknown:
        logger.warning("%s does not know %s: never found", config.model.path.name, ", ".join(match.unknown))
    count = min(config.candidates, layout.boxes * len(match.selected))
    adapter = Adapter(config.input, layout, config.activation, config.per_box, match.selected, match.labels, count)
    images = CocoSplit(data.folder("val"), data.annotations("val")).files[: config.parity_images]
    spec = ImageSpec(foreign.canvas.height, foreign.canvas.width, config.input.pad, config.input.fit)
    fed = np.stack([spec.prepare(decode(image))[0] for image in images])
    foreign = for_any_batch(foreign, adapter.feed(fed[:2]))
    as_given = AsGiven(foreign, adapter)
    if problems := list(implausible(as_given.infer(fed), adapter, config.evaluation_score_threshold)):
        raise UserError(f"external: {config.model.path.name}: {'; '.join(problems)}")
    source = ForeignFile(
        file=config.model.path.name,
        sha256=hashlib.sha256(config.model.path.read_bytes()).hexdigest(),
        licence=foreign.metadata.get("license", ""),
        unknown_classes=match.unknown,
    )
    contract = contract_of(config, data, spec, count, foreign.one_by_one, source)
    file = directory / "model.onnx"
    adapted = adapter.around(foreign)
    onnx.helper.set_model_props(adapted, foreign.metadata)
    onnx.save(adapted, file)
    onnx.checker.check_model(str(file), full_check=True)
    contract.write_to_onnx(file)
    initialisers, constants = carried(adapted, onnx.load(config.model.path), "external")
    parity = Reference(as_given, contract, images).parity(file, Tolerance(config.parity_box_px, config.parity_score))
    logger.info("parity: %s", parity.sentence)
    if not parity.verdict:
        raise VerdictError(f"external: the adapted file does not detect what {source.file} does: {parity.sentence}")
    sentences = [parity.sentence]
    if config.nms == "graph":
        contract, sentence = with_nms_inside(file, contract, images)
        sentences.append(sentence)
    (opset,) = (one.version for one in adapted.opset_import if one.domain == "")
    return ExportedModel(
        file=file.name,
        precision=precision_of(foreign.model),
        sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
        bytes=file.stat().st_size,
        classes=data.classes,
        parameters=foreign.numbers,
        flops=graph_flops(foreign.model),
        opset=opset,
        contract=json.loads(contract.to_json()),
        parity=ParityRecord.of(parity, f"{source.file} decoded in numpy", sentence="; ".join(sentences)),
        initialisers=initialisers,
        constants=constants,
        candidates=count,
        source="",
        foreign=source,
    )


def described(config: Config) -> tuple[Foreign, Layout]:
    """The file and the meaning of its outputs. Raises UserError where they contradict each other."""
    foreign = read(config.model.path, config.input.layout, config.input.size)
    outputs = foreign.chosen(config.layout.config.outputs)
    layout = config.layout.cls(config.layout.config, outputs, len(names_of(config)), foreign.canvas)
    if layout.one_class and config.activation != "none":
        raise UserError(
            f"external: activation: {config.activation}, but {config.model.path.name} gives one score a box, and the zeros "
            "of the other classes would be activated too; set none, or export it with probabilities"
        )
    return foreign, layout


def names_of(config: Config) -> tuple[str, ...]:
    """The model's classes."""
    return COCO80 if config.classes == "coco80" else config.classes


def contract_of(
    config: Config, data: Dataset, spec: ImageSpec, count: int, one_by_one: bool, source: ForeignFile
) -> Contract:
    """The contract of the adapted file, before NMS is put into it."""
    return Contract(
        image=spec,
        classes=data.classes,
        category_ids=data.category_ids,
        candidates=count,
        score_threshold=config.score_threshold,
        evaluation_score_threshold=config.evaluation_score_threshold,
        nms_iou=config.nms_iou,
        max_detections=config.max_detections,
        nms="none" if config.nms == "none" else "host",
        one_by_one=one_by_one,
        producer={"name": "headstart", "foreign": source.model_dump(mode="json")},
    )


def check(config: Config, wired: Mapping[str, Any]) -> Iterable[str]:
    """The file and its description fit each other."""
    if len(set(names_of(config))) < len(names_of(config)):
        yield "classes: some names are there twice"
    try:
        described(config)
    except UserError as problem:
        yield str(problem).removeprefix("external: ")
