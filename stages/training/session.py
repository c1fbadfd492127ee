"""One detector's training on one dataset: images and targets from the split to the loop. Teacher, control and student
all pass here, so they differ in nothing but their task and their settings."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.log import logger
from stages.artifacts.dataset import Dataset
from stages.data.augment import AugmentConfig
from stages.data.cache import Cache, PixelCache
from stages.data.coco import CocoSplit
from stages.data.loader import Batch, start_method, training_batches
from stages.data.sheet import sample_sheet
from stages.data.workers import measured_batches
from stages.detection.detector import Detector
from stages.detection.load import load_backbone, load_published
from stages.detection.published import PublishedFile
from stages.detection.records import Targets
from stages.training.loop import Fitted, Trainer, TrainingConfig
from stages.training.scalars import missing
from stages.training.task import TrainingTask

SAMPLES = "samples.jpg"
"""Some training images as they are learnt from, with their boxes."""


class SessionConfig(TrainingConfig):
    """Settings of every stage that trains a detector."""

    weights: PublishedFile | None = None
    """Weights of the whole detector to begin with: ours (safetensors), torchvision's, OpenMMLab's or, for a yolo,
    Ultralytics' (classes are matched by name); a path, or the name of a file in `weights/` or in the folder of torch hub."""
    sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    """sha256 that the file `weights` must have."""
    trust: bool = False
    """Open `weights` even if it is a pickled model, which may run code: yours to say, of the one file with `sha256`."""
    backbone_weights: PublishedFile | None = None
    """Weights for the backbone to begin with: torchvision's or timm's classification checkpoint, or the backbone of a
    detector's; found as `weights` are."""
    images: int | None = Field(default=None, ge=1)
    """Use only this many labelled training images, the same ones for every stage that asks for as many; all if not given."""
    augment: AugmentConfig = AugmentConfig()
    """Augmentation of the training images."""
    workers: Annotated[int, Field(ge=0)] | Literal["auto"] = 0
    """Processes that load images; the images are the same for any number. `auto` measures it on the first steps: from 0 on
    twice as many each time, as long as a step takes at least 5 % less."""
    cache: Cache = "none"
    """Where decoded images are kept for the next epoch: `memory`, or `disk` (a file in the stage's folder, gone at the end).
    Changes no result."""


def contradictions(config: SessionConfig) -> Iterator[str]:
    """Settings that cannot both be meant, or not here."""
    if config.weights and config.backbone_weights:
        yield "give `weights` or `backbone_weights`, not both"
    if (config.sha256 or config.trust) and not config.weights:
        yield "sha256 and trust speak of the file `weights`, and none is given; give it, or remove them"
    if config.trust and not config.sha256:
        yield "trust is in one file alone; set sha256, the hash of `weights`"
    if config.weights is None and (config.steps == 0 or config.epochs == 0):
        yield "steps or epochs of 0 only load weights, and no `weights` are given; give them, or train"
    if config.cache != "none" and config.workers != 0 and start_method() != "fork":
        yield f"cache: {config.cache} is shared with workers by fork, which this system does not have; set workers: 0"
    if problem := missing(config.tensorboard):
        yield problem


def begin(detector: Detector, config: SessionConfig, class_names: Sequence[str]) -> None:
    """Put the given weights, if any, into a new detector. Raises UserError where they are not its own."""
    if config.weights:
        load_published(detector, config.weights.path, class_names, config.trust, config.sha256)
    if config.backbone_weights:
        load_backbone(detector, config.backbone_weights.path)


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
    split, spec, augment = training_split(config, data), data.image_spec(), config.augment
    sample_sheet(split, spec, augment, config.seed, data.classes).save(directory / SAMPLES, quality=80)
    trainer = Trainer(task, config, max(1, len(split) // config.batch_size), directory)
    pinned = trainer.fabric.device.type == "cuda"
    fit = spec if augment.one_size else None
    pixels = None if config.cache == "none" else PixelCache(split, config.cache, directory, fit)

    def loaded(first_step: int, workers: int) -> Generator[Batch, None, None]:
        return training_batches(
            split, spec, augment, config.batch_size, config.seed, first_step, workers, pixels, pinned
        )

    def batches(first_step: int) -> Iterator[tuple[Tensor, Targets]]:
        if config.workers == "auto":
            made = measured_batches(
                loaded, first_step, most=torch.get_num_threads()
            )  # this training's share of the cores
        else:
            made = loaded(first_step, config.workers)
        for batch in made:
            sizes = [(int(height), int(width)) for height, width in batch.sizes_B2.tolist()]
            yield batch.images_BCHW, Targets(batch.boxes, batch.labels, sizes)

    logger.info(
        "%d iterations of %d images, %d labelled images, on %s",
        trainer.iterations,
        config.batch_size,
        len(split),
        trainer.fabric.device,
    )
    fitted = trainer.fit(batches, evaluate)
    logger.info("%.1f s in steps, %.1f s waiting for images", fitted.seconds, fitted.waited)
    return fitted
