"""Write the student as an ONNX file and prove on real images that it detects what PyTorch detects."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import onnx
from pydantic import Field

from deploy.parity import Parity, Tolerance
from pipeline.config import BaseConfig
from pipeline.errors import UserError, VerdictError
from pipeline.log import logger
from stages.artifacts.checkpoint import Checkpoint
from stages.artifacts.dataset import Dataset
from stages.artifacts.exported_model import ExportedModel, ParityRecord
from stages.data.coco import CocoSplit
from stages.detection.load import load_detector, parameter_count
from stages.detection.planned import planned_detector
from stages.evaluation.flops import inference_flops
from stages.evaluation.in_memory import InMemory
from stages.evaluation.measure import contract_for
from stages.exporting.agreement import Reference
from stages.exporting.nms import with_nms_inside
from stages.exporting.onnx_file import OPSET, write_onnx
from stages.exporting.precision import lower
from stages.exporting.tracing import traced

CODE = ("deploy.backends.onnxruntime",)  # reached by name at run time


class Config(BaseConfig):
    candidates: int = Field(default=1000, ge=1)
    """Boxes an image before NMS; AP needs 1,000, a deployment threshold is content with fewer."""
    nms: Literal["host", "graph"] = "host"
    """Who suppresses duplicates: numpy after the graph, the same for every runtime, or ONNX's own node inside it, which
    ONNX Runtime executes, TensorRT's parser knows and TensorRT-RTX cannot build."""
    score_threshold: float = Field(default=0.3, ge=0, le=1)
    """Deployment threshold, written into the contract. AP is measured far below it."""
    nms_iou: float = Field(default=0.5, gt=0, le=1)
    """Overlap above which the weaker of two boxes of a class goes."""
    max_detections: int = Field(default=100, ge=1)
    """Detections kept an image."""
    parity_images: int = Field(default=32, ge=1)
    """Validation images on which file and PyTorch must agree."""
    parity_box_px: float = Field(default=0.5, gt=0)
    """Largest difference of a box edge, in pixels of the original image."""
    parity_score: float = Field(default=1e-3, gt=0)
    """Largest difference of a score."""
    precision: Literal["fp32", "fp16"] = "fp32"
    """fp16 makes the file strongly typed, its layers in half precision, the decoding in single: for GPUs."""
    fp32_layers: tuple[str, ...] | None = None
    """Layers of an fp16 file that stay in float32, by names or patterns, as `head.*`; the fewest that parity needs if not
    given."""
    max_fp32_layers: int = Field(default=8, ge=0)
    """Most layers that may be found to need float32."""
    parity_fp16_box_px: float = Field(default=1.0, gt=0)
    """As parity_box_px, for an fp16 file."""
    parity_fp16_score: float = Field(default=1e-2, gt=0)
    """As parity_score, for an fp16 file."""


def run(config: Config, directory: Path, *, checkpoint: Checkpoint, data: Dataset) -> ExportedModel:
    """ONNX with its contract in the metadata; parity decides."""
    detector = load_detector(checkpoint.detector, len(checkpoint.classes), checkpoint.path(checkpoint.weights))
    if not detector.exportable:
        raise UserError(f"export: {checkpoint.detector['name']} has no static graph; export a dense detector")
    if config.nms == "graph" and not detector.needs_nms:
        raise UserError(f"export: nms: graph, and {checkpoint.detector['name']} needs no NMS; leave nms out")
    contract = contract_for(
        data,
        config.candidates,
        score_threshold=config.score_threshold,
        nms_iou=config.nms_iou,
        max_detections=config.max_detections,
        nms="host" if detector.needs_nms else "none",
        producer=producer(checkpoint),
    )
    file = directory / "model.onnx"
    initialisers, constants = write_onnx(detector, data.height, data.width, config.candidates, file)
    contract.write_to_onnx(file)
    images = CocoSplit(data.folder("val"), data.annotations("val")).files[: config.parity_images]
    reference = Reference(InMemory(detector, config.candidates), contract, images)
    if config.precision == "fp16":
        whole = onnx.load(file)
        islands, parity = halved(config, file, reference)
        initialisers, constants = traced(onnx.load(file), whole, "export")
    else:
        islands, parity = (), reference.parity(file, Tolerance(config.parity_box_px, config.parity_score))
    logger.info("parity: %s", parity.sentence)
    if not parity.verdict:
        raise VerdictError(f"export: the ONNX file does not detect what PyTorch detects: {parity.sentence}")
    sentences = [parity.sentence]
    if config.nms == "graph":
        contract, sentence = with_nms_inside(file, contract, images)
        sentences.append(sentence)
    return ExportedModel(
        file=file.name,
        precision=config.precision,
        float_layers=islands,
        sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
        bytes=file.stat().st_size,
        classes=data.classes,
        parameters=parameter_count(detector),
        flops=inference_flops(detector, data.height, data.width),
        opset=OPSET,
        contract=json.loads(contract.to_json()),
        parity=ParityRecord.of(parity, checkpoint.name, sentence="; ".join(sentences)),
        initialisers=initialisers,
        constants=constants,
        candidates=config.candidates,
        licences=checkpoint.licences,
        source=checkpoint.key,
    )


def producer(checkpoint: Checkpoint) -> dict[str, Any]:
    """Who made the file of what, and the licences that came with it, where any did: the file may travel alone."""
    told = {"name": "headstart", "detector": checkpoint.detector}
    return told | ({"licences": list(checkpoint.licences)} if checkpoint.licences else {})


def halved(config: Config, file: Path, reference: Reference) -> tuple[tuple[str, ...], Parity]:
    """Put the file in half precision; the layers that stay in float32, and how it agrees with the reference."""
    tolerance = Tolerance(config.parity_fp16_box_px, config.parity_fp16_score)
    return lower(file, lambda twin: reference.parity(twin, tolerance), config.fp32_layers, config.max_fp32_layers)


def check(config: Config, wired: Mapping[str, Any]) -> Iterable[str]:
    """Only a dense detector has a static graph."""
    for node in wired.get("checkpoint", ()):
        choice = planned_detector(node)
        if choice is not None and not choice.cls.exportable:
            yield f"{choice.name} of stage {node.name} cannot be exported; export a dense detector, as retinanet"
