"""A file that a runtime executes."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from pipeline.artifact import Artifact


class ParityRecord(BaseModel):
    """Detections of the file against those of its source on the same images, by deploy.parity."""

    model_config = ConfigDict(frozen=True)

    reference: str
    images: int
    matched: int
    unmatched: int
    max_box_px: float
    max_score: float
    label_mismatches: int
    passed: bool
    sentence: str


class ExportedModel(Artifact):
    """An ONNX file (or an engine) with its contract inside, and the proof that it computes what its source does."""

    file: str
    backend: str = "onnxruntime"
    precision: str = "fp32"
    sha256: str
    bytes: int
    classes: tuple[str, ...]
    parameters: int
    flops: int
    """Multiply-adds times two on one image of the canvas."""
    opset: int
    contract: dict[str, Any]
    candidates: int = 1000
    """Boxes an image before NMS; the contract's are those that leave the graph, fewer where NMS is inside."""
    parity: ParityRecord
    initialisers: int
    """Learnt tensors in the file, every one traced back to a tensor of the student."""
    constants: int
    """What else it holds: geometry of the anchors, integers of shapes, fills of one value. There is no third kind."""
    source: str
    """Key of the checkpoint it was exported from."""
