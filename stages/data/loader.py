"""Endless training batches whose step k is the same whoever asks: after a resume, with any number of workers.

    positions 0, 1, 2, ... -> epoch and place in that epoch's permutation -> image -> augmented with its own generator

Step k holds the positions k * batch_size to (k + 1) * batch_size - 1 of that endless stream. Nothing is dropped: a
batch at the end of an epoch goes on with the next one, so each image is seen once an epoch whatever the batch size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import count

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from deploy.image import ImageSpec
from stages.data.augment import AugmentConfig, Placed, place
from stages.data.coco import CocoSplit


@dataclass(frozen=True)
class Batch:
    """B images of one size, and what is on each."""

    images_BCHW: Tensor
    """uint8."""
    boxes: list[Tensor]
    """Of each image (N, 4) float32 xyxy in pixels of the canvas."""
    labels: list[Tensor]
    """Of each image (N,) int64."""
    sizes_B2: Tensor
    """int64 (height, width) of each image's content, which begins at the top left of the canvas."""
    image_ids: list[int]


class _Stream(Dataset[tuple[int, Placed]]):
    """The endless stream: item `position` is (image id, the sample on its canvas)."""

    def __init__(self, split: CocoSplit, spec: ImageSpec, augment: AugmentConfig, seed: int) -> None:
        self.split, self.spec, self.augment, self.seed = split, spec, augment, seed

    def __getitem__(self, position: int) -> tuple[int, Placed]:
        epoch, within = divmod(position, len(self.split))
        index = int(_permutation(len(self.split), self.seed, epoch)[within])
        sample = self.split.sample(index)
        rng = np.random.default_rng([self.seed, epoch, index])
        return sample.image_id, place(sample, self.spec, self.augment, rng)


@lru_cache(maxsize=4)
def _permutation(length: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(length)


def _collate(samples: list[tuple[int, Placed]]) -> Batch:
    ids, placed = [image_id for image_id, _ in samples], [sample for _, sample in samples]
    return Batch(
        images_BCHW=torch.stack([sample.image_CHW for sample in placed]),
        boxes=[sample.boxes_N4 for sample in placed],
        labels=[sample.labels_N for sample in placed],
        sizes_B2=torch.tensor([sample.size for sample in placed]),
        image_ids=ids,
    )


def training_batches(
    split: CocoSplit,
    spec: ImageSpec,
    augment: AugmentConfig,
    batch_size: int,
    seed: int,
    first_step: int = 0,
    workers: int = 0,
) -> Iterator[Batch]:
    """Yield the batches of step `first_step`, `first_step` + 1, ... without end.

    A batch depends on its step, `seed` and the settings only. Takes nothing from torch's global random numbers. Raises
    ValueError where `split` is empty.
    """
    if not len(split):
        raise ValueError("training_batches: the split has no images")
    steps = (range(step * batch_size, (step + 1) * batch_size) for step in count(first_step))
    loader: DataLoader[tuple[int, Placed]] = DataLoader(
        _Stream(split, spec, augment, seed),
        batch_sampler=steps,  # type: ignore[arg-type]  # any iterable will do, and this one has no length
        num_workers=workers,
        collate_fn=_collate,
        generator=torch.Generator(),  # else it would draw its workers' seed from the global generator
    )
    yield from loader
