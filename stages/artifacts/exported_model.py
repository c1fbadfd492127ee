"""A file that a runtime executes."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from deploy.parity import Parity
from pipeline.artifact import Artifact
from pipeline.errors import UserError

Int8Runtime = Literal["onnxruntime", "tensorrt"]
"""Whom an INT8 file is for: none serves both."""


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

    @classmethod
    def of(cls, parity: Parity, reference: str, **told: Any) -> ParityRecord:
        """What `compare` found against the file named `reference`, except for what is told."""
        found = {name: getattr(parity, name) for name in cls.model_fields if hasattr(parity, name)}
        return cls(**(found | {"reference": reference, "passed": parity.verdict} | told))


class LayerCost(BaseModel):
    """What one layer's lower precision costs."""

    model_config = ConfigDict(frozen=True)

    layer: str
    """Of its weight, as in the detector."""
    disagreement: float
    """Of the detections with this layer alone quantised from those of the float file: 0 the same, 1 nothing found again."""
    kept: bool
    """Whether the shipped file computes it in float."""


class Quantisation(BaseModel):
    """How a file got its eight bits, and what they cost on training images that it was not calibrated on."""

    model_config = ConfigDict(frozen=True)

    runtime: Int8Runtime
    """Whom the file is for: onnxruntime (uint8 activations) or tensorrt (int8 around zero)."""
    calibration: str
    """minmax, entropy or percentile."""
    images: int
    """Training images whose values gave the ranges; calibration.json names them."""
    images_sha256: str
    """Of the hashes of their pixels, sorted."""
    validation_images: int
    """Validation images whose pixels were compared with those of each: none is among them."""
    left_out: tuple[str, ...]
    """Training images drawn and not used, since they are validation images too."""
    held_out: int
    """Other training images, on which layers were chosen and the following was measured."""
    ap_before: float
    ap_after: float
    ap_drop_low: float
    """95 % interval of the loss, by a paired bootstrap over the held-out images."""
    ap_drop_high: float
    max_ap_drop: float
    """The budget."""
    layers: tuple[LayerCost, ...]
    """The most sensitive first."""
    cpu: str
    instructions: tuple[str, ...]
    """What this CPU has for eight-bit products, by the names in /proc/cpuinfo; none is said of other systems."""


class ForeignFile(BaseModel):
    """Where a model comes from that was not trained here."""

    model_config = ConfigDict(frozen=True)

    file: str
    sha256: str
    licence: str
    """What the file says of its own licence in its metadata; empty where it says nothing."""
    unknown_classes: tuple[str, ...]
    """Classes of the dataset that it does not know and never finds."""


class ExportedModel(Artifact):
    """An ONNX file (or an engine) with its contract inside, and the proof that it computes what its source does."""

    file: str
    """An engine's sidecar is this name with `.json` behind it."""
    backend: str = "onnxruntime"
    precision: str = "fp32"
    """fp32, fp16 or int8: of its layers; what is before and behind them is always float32."""
    float_layers: tuple[str, ...] = ()
    """Layers that compute in float32 all the same."""
    quantisation: Quantisation | None = None
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
    """Learnt tensors in the file, every one traced back to a tensor of the student, or of the foreign file."""
    constants: int
    """What else it holds: geometry of the anchors, integers of shapes, fills of one value, and the description around a
    foreign graph. There is no third kind."""
    licences: tuple[str, ...] = ()
    """Those of the checkpoint."""
    source: str
    """Key of the checkpoint it was exported from, or of the exported model it was quantised or built from; empty of a
    foreign one."""
    foreign: ForeignFile | None = None
    """The file that it was adapted from, where it was not trained here."""

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
