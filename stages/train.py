"""Train a detector on labels, or only load its weights: the teacher, and the control that no one teaches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from pipeline.config import Choice, ExternalFile
from pipeline.errors import UserError
from stages.artifacts.checkpoint import Checkpoint
from stages.artifacts.dataset import Dataset
from stages.detection.backbones import load_imagenet
from stages.detection.detector import Detector
from stages.detection.load import load_published, parameter_count, save_weights
from stages.distillation.task import DistillationTask
from stages.evaluation.measure import average_precision
from stages.training.session import SessionConfig, train, training_split

RESUMES = True


class Config(SessionConfig):
    detector: Choice[Detector]
    """The detector and its settings."""
    weights: ExternalFile | None = None
    """Weights of the whole detector to begin with: ours (safetensors) or torchvision's (classes are matched by name)."""
    backbone_weights: ExternalFile | None = None
    """A torchvision classification checkpoint for the backbone to begin with."""


def check(config: Config, wired: Mapping[str, Any]) -> Iterable[str]:
    """Settings that contradict one another."""
    if config.weights and config.backbone_weights:
        yield "give `weights` or `backbone_weights`, not both"
    if config.weights is None and (config.steps == 0 or config.epochs == 0):
        yield "steps or epochs of 0 only load weights, and no `weights` are given; give them, or train"


def run(config: Config, directory: Path, *, data: Dataset) -> Checkpoint:
    """Train from random weights or the given ones."""
    torch.manual_seed(config.seed)
    detector = config.detector.cls.build(config.detector.config, len(data.classes))
    if config.weights:
        load_published(detector, config.weights.path, data.classes)
    if config.backbone_weights:
        try:
            load_imagenet(detector.backbone, config.backbone_weights.path)
        except ValueError as problem:
            raise UserError(f"backbone_weights: {problem}") from problem
    fitted = train(DistillationTask(detector), config, data, directory, lambda kept: average_precision(kept, data))
    save_weights(detector, directory / "model.safetensors")
    return Checkpoint(
        detector=config.detector.dump(),
        classes=data.classes,
        weights="model.safetensors",
        parameters=parameter_count(detector),
        metrics="metrics.jsonl",
        iterations=fitted.iterations,
        seconds=fitted.seconds,
        images=len(training_split(config, data)) if fitted.iterations else 0,
        seed=config.seed,
    )
