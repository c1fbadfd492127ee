"""A file that a runtime executes."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from pipeline.artifact import Artifact
from pipeline.errors import UserError


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
    """An engine's sidecar is this name with `.json` behind it."""
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
    parity: ParityRecord | None
    """None where the file was not executed: nothing is known of what it computes."""
    not_executed: str = ""
    """Why an engine was built and not run; empty where it ran."""
    made_for: dict[str, Any] = Field(default_factory=dict)
    """What a machine must have to run an engine: compute capabilities, versions; empty where any will do."""
    census: dict[str, Any] | None = None
    """Of an engine: the precision of its layers as asked for and as built, by deploy.census."""
    initialisers: int
    """Learnt tensors in the file, every one traced back to a tensor of the student."""
    constants: int
    """What else it holds: geometry of the anchors, integers of shapes, fills of one value. There is no third kind."""
    source: str
    """Key of the checkpoint it was exported from; of an engine that of the exported model it was built from."""

    @property
    def executed(self) -> bool:
        """Whether it has run, so that something is known of what it computes."""
        return self.parity is not None

    def refuse_unexecuted(self, stage: str) -> None:
        """Raise UserError where the engine cannot be run by this machine."""
        if not self.executed:
            raise UserError(
                f"{stage}: {self.name} cannot be executed here: {self.not_executed}; name the other models "
                "(needs: {models: [...]}), or give the stage a target that has such a device"
            )
