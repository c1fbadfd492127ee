"""One detector's training on one dataset: images and targets from the split to the loop. Teacher, control and student
all pass here, so they differ in nothing but their task and their settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pydantic import Field
from torch import Tensor, nn

from pipeline.config import ExternalFile
from pipeline.errors import UserError
from pipeline.log import logger
from stages.artifacts.dataset import Dataset
from stages.data.augment import AugmentConfig
from stages.data.coco import CocoSplit
from stages.data.loader import training_batches
from stages.detection.detector import Detector
from stages.detection.load import load_published
from stages.detection.records import Targets
from stages.training.loop import Fitted, Trainer, TrainingConfig
from stages.training.scalars import missing
from stages.training.task import TrainingTask


class SessionConfig(TrainingConfig):
    """Settings of every stage that trains a detector."""

    weights: ExternalFile | None = None
    """Weights of the whole detector to begin with: ours (safetensors) or torchvision's (classes are matched by name)."""
    backbone_weights: ExternalFile | None = None
    """A torchvision classification checkpoint for the backbone to begin with."""
    images: int | None = Field(default=None, ge=1)
    """Use only this many labelled training images, the same ones for every stage that asks for as many; all if not given."""
    augment: AugmentConfig = AugmentConfig()
    """Augmentation of the training images."""
    workers: int = Field(default=0, ge=0)
    """Processes that load images; the images are the same for any number."""


def contradictions(config: SessionConfig) -> Iterator[str]:
    """Settings that cannot both be meant, or not here."""
    if config.weights and config.backbone_weights:
        yield "give `weights` or `backbone_weights`, not both"
    if config.weights is None and (config.steps == 0 or config.epochs == 0):
        yield "steps or epochs of 0 only load weights, and no `weights` are given; give them, or train"
    if problem := missing(config.tensorboard):
        yield problem


def begin(detector: Detector, config: SessionConfig, class_names: Sequence[str]) -> None:
    """Put the given weights, if any, into a new detector. Raises UserError where they are not its own."""
    if config.weights:
        load_published(detector, config.weights.path, class_names)
    if config.backbone_weights:
        try:
            detector.load_backbone(config.backbone_weights.path)
        except ValueError as problem:
            raise UserError(f"backbone_weights: {problem}") from problem


def training_split(config: SessionConfig, data: Dataset) -> CocoSplit:
    """The labelled images of this training. Raises UserError where there are too few."""
    split = CocoSplit(data.folder("train"), data.annotations("train"))
    if config.images is not None:
        if config.images > len(split):
            raise UserError(f"images: {config.images} asked for, the training split has {len(split)}; ask for fewer")
        split = split.subset(config.images, seed=0)  # not the training's seed: every arm and seed sees the same labels
    if len(split) < config.batch_size:
        raise UserError(f"batch_size: {config.batch_size} with {len(split)} training images; lower batch_size")
    return split


def train(
    task: TrainingTask,
    config: SessionConfig,
    data: Dataset,
    directory: Path,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
) -> Fitted:
    """Train `task` in place, continuing from `directory`'s checkpoint if there is one."""
    if config.iterations(1) == 0:
        return Fitted(0)
    split = training_split(config, data)
    spec = data.image_spec()

    def batches(first_step: int) -> Iterator[tuple[Tensor, Targets]]:
        made = training_batches(split, spec, config.augment, config.batch_size, config.seed, first_step, config.workers)
        for batch in made:
            sizes = [(int(height), int(width)) for height, width in batch.sizes_B2.tolist()]
            yield batch.images_BCHW, Targets(batch.boxes, batch.labels, sizes)

    trainer = Trainer(task, config, max(1, len(split) // config.batch_size), directory)
    logger.info(
        "%d iterations of %d images, %d labelled images, on %s",
        trainer.iterations,
        config.batch_size,
        len(split),
        trainer.fabric.device,
    )
    return trainer.fit(batches, evaluate)
