"""Detectors with weights, as they travel between stages."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from pipeline.artifact import Artifact


class TrainedDetector(Artifact):
    """A detector and how its weights came about. Its own AP is nobody's word: `validate` measures it."""

    incidental: ClassVar[tuple[str, ...]] = (
        "seconds",
        "waited",
        "tensorboard",
        "samples",
    )  # the same weights are the same
    detector: dict[str, Any]
    """Name and all settings, as in a config."""
    classes: tuple[str, ...]
    weights: str
    """safetensors file."""
    parameters: int
    metrics: str | None = None
    """metrics.jsonl of the training: losses, learning rate, AP while training."""
    tensorboard: str | None = None
    """Folder of the same numbers as TensorBoard events, where they were asked for."""
    iterations: int = 0
    seconds: float = 0.0
    """Spent in training steps: batches, validation and checkpoints not counted."""
    waited: float = 0.0
    """Seconds in which training steps waited for their batch, beside `seconds`."""
    samples: str | None = None
    """JPEG of some training images as they were learnt from: augmented, with their boxes."""
    images: int = 0
    """Labelled images it was trained on."""
    seed: int = 0
    source: str = ""
    """Key of the artifact it was made from, if it was made from one (what it was pruned from; who taught it)."""
    licences: tuple[str, ...] = ()
    """SPDX identifiers that detectors brought, its own and its teachers'; sorted."""


class PruneProof(BaseModel):
    """What the prune stage found when it looked for anything left of the distillation."""

    model_config = ConfigDict(frozen=True)

    probes: int
    """Images on which a fresh process reproduced what the student gave before pruning, bit for bit."""
    removed_tensors: int
    removed_parameters: int
    removed_bytes: int
    removed_flops: int
    """Operations of one training forward that inference does not pay: assistants, adapters."""
    removed: dict[str, int]
    """Parameters removed, by method and module."""
    parameters: int
    """Equal to those of a student built from its settings alone."""
    flops: int
    """Multiply-adds times two of the student's forward on one image of the canvas."""


class Checkpoint(TrainedDetector):
    """A detector that is only itself: it can be exported."""

    proof: PruneProof | None = None


class Teacher(BaseModel):
    """Who taught, and how good it was before it did."""

    model_config = ConfigDict(frozen=True)

    name: str
    """Of its node."""
    key: str
    """Of its artifact."""
    checksum: str
    """sha256 over its tensors, equal before and after."""
    ap: float | None = None
    """AP from 0 to 1 on the sample, measured before it taught; None where none was taken or nothing is to be found."""
    images: int = 0
    """Validation images of the sample."""
    licences: tuple[str, ...] = ()
    """Those of its checkpoint."""


class GradientShare(BaseModel):
    """What one loss gave of the gradient in the first steps: its norm, as a share of the sum of all losses' norms."""

    model_config = ConfigDict(frozen=True)

    loss: str
    """As in metrics.jsonl."""
    neck: float
    """Over all levels of the student's neck, from 0 to 1."""
    backbone: float
    """Over all stages of its backbone that learn."""


class DistilledCheckpoint(TrainedDetector):
    """A student with what it learnt by: `student.*` and `methods.*`. Not exportable before it is pruned."""

    methods: dict[str, dict[str, Any]]
    """Name in the config to method name and all settings."""
    teachers: tuple[Teacher, ...] = ()
    """In the order in which they were wired; `source` is the first."""
    gradients: tuple[GradientShare, ...] = ()
    """Means over a few of the first steps; empty after a training too short for any."""
    gradient_warnings: tuple[str, ...] = ()
    """Losses that were dead, or left the detection losses no say, one sentence each."""
    unlabelled: int = 0
    """Images without labels that it learnt from too."""
    methods_flops: int
    """Operations of one training forward on one image that are not the student's: teacher, assistants, adapters."""
    probes: str
    """safetensors: prepared images and the student's candidates on them, recorded before pruning."""
