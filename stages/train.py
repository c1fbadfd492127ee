"""Train a detector on labels, or only load its weights: the teacher, and the control that no one teaches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from pipeline.config import Choice
from pipeline.log import logger
from stages.artifacts.checkpoint import Checkpoint
from stages.artifacts.dataset import Dataset
from stages.detection.detector import Detector
from stages.detection.load import parameter_count, save_weights
from stages.distillation.task import DistillationTask
from stages.evaluation.measure import average_precision
from stages.evaluation.teachers import sampled_ap
from stages.training.scalars import EVENTS, METRICS
from stages.training.session import SessionConfig, begin, contradictions, train, training_split

RESUMES = SIDE_BY_SIDE = True
SCRATCH = ("last.ckpt", "previous.ckpt")


class Config(SessionConfig):
    detector: Choice[Detector]
    """The detector and its settings."""
    loaded_sample: int = Field(default=100, ge=0)
    """Validation images on which weights that are only loaded (`steps` or `epochs` of 0) are measured, before anybody learns
    from them; the log says their AP. 0 measures none."""


def check(config: Config, wired: Mapping[str, Any]) -> Iterable[str]:
    """Settings that contradict one another."""
    return contradictions(config)


def run(config: Config, directory: Path, *, data: Dataset) -> Checkpoint:
    """Train from random weights or the given ones."""
    torch.manual_seed(config.seed)
    detector = config.detector.cls.build(config.detector.config, len(data.classes))
    begin(detector, config, data.classes)
    fitted = train(DistillationTask(detector), config, data, directory, lambda kept: average_precision(kept, data))
    if fitted.iterations == 0 and config.loaded_sample:
        ap = sampled_ap(detector.eval(), data, config.loaded_sample)
        said = "no AP, for want of objects" if ap is None else f"{100 * ap:.1f} AP"
        images = min(config.loaded_sample, data.val.image_count)
        logger.info("loaded %s: %s on a sample of %d validation images", config.weights, said, images)
    save_weights(detector, directory / "model.safetensors", data.classes)
    return Checkpoint(
        detector=config.detector.dump(),
        classes=data.classes,
        weights="model.safetensors",
        parameters=parameter_count(detector),
        metrics=METRICS if fitted.iterations else None,
        tensorboard=EVENTS if fitted.iterations and config.tensorboard else None,
        iterations=fitted.iterations,
        seconds=fitted.seconds,
        images=len(training_split(config, data)) if fitted.iterations else 0,
        seed=config.seed,
    )
