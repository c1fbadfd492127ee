"""Endless training batches whose step k is the same whoever asks: after a resume, with any number of workers.

    positions 0, 1, 2, ... -> epoch and place in that epoch's permutation -> image -> augmented with its own generator

Step k holds the positions k * batch_size to (k + 1) * batch_size - 1 of that endless stream. Nothing is dropped: a
batch at the end of an epoch goes on with the next one, so each image is seen once an epoch whatever the batch size.
An image is decoded, resized and written to its place in the batch: nothing is copied but its pixels, once.
"""

from __future__ import annotations

import multiprocessing
import weakref
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from deploy.image import ImageSpec
from stages.data.augment import AugmentConfig, Pixels, Placed, place
from stages.data.coco import CocoSplit, Sample
from stages.data.mixing import mixup, mosaic
from stages.data.photometric import distort, grey_of

Decode = Callable[[int, Pixels | None], Pixels]
"""Gives an image by its index; it may use the canvas to lay it on."""


@dataclass(frozen=True)
class Batch:
    """B images of one size, and what is on each."""

    images_BCHW: Tensor
    """uint8, in channels-last memory, as the training wants it."""
    boxes: list[Tensor]
    """Of each image (N, 4) float32 xyxy in pixels of the canvas."""
    labels: list[Tensor]
    """Of each image (N,) int64."""
    sizes_B2: Tensor
    """int64 (height, width) of each image's content, which begins at the top left of the canvas."""
    image_ids: list[int]


class _Parcel(NamedTuple):
    """A batch as a worker sends it: one tensor, in shared memory, and small arrays, which cost less as bytes."""

    images_BHWC: Tensor
    boxes: list[NDArray[np.float32]]
    labels: list[NDArray[np.int64]]
    sizes: list[tuple[int, int]]
    image_ids: list[int]

    def opened(self) -> Batch:
        return Batch(
            images_BCHW=self.images_BHWC.permute(0, 3, 1, 2),
            boxes=[torch.from_numpy(boxes_N4) for boxes_N4 in self.boxes],
            labels=[torch.from_numpy(labels_N) for labels_N in self.labels],
            sizes_B2=torch.tensor(self.sizes),
            image_ids=self.image_ids,
        )


class _Stream(Dataset[_Parcel]):
    """The endless stream, a batch at a time: item k is the batch of step k."""

    def __init__(
        self,
        split: CocoSplit,
        spec: ImageSpec,
        augment: AugmentConfig,
        batch_size: int,
        seed: int,
        pixels: Decode | None = None,
    ) -> None:
        self.split, self.spec, self.augment, self.batch_size, self.seed = split, spec, augment, batch_size, seed
        self.pixels = pixels or split.pixels
        self.mean = grey_of(spec.pad_rgb)
        self._spare: list[Pixels] = []  # memory of batches that are gone
        off = augment.switch_off
        self.mixed_until = float("inf") if off is None else round(off * len(split))  # a position of the stream

    def __getitem__(self, step: int) -> _Parcel:
        # Decoding drives all else from the processor's caches: what comes before and after it is done for all images at one
        # go (benchmarks/loader.py).
        drawn = [self._drawn(step * self.batch_size + place) for place in range(self.batch_size)]
        images_BHWC = self._canvases()
        made = [self._made(*one, canvas) for one, canvas in zip(drawn, images_BHWC.numpy(), strict=True)]
        targets = [placed.targets() for placed in made]
        return _Parcel(
            images_BHWC,
            [boxes_N4 for boxes_N4, _ in targets],
            [labels_N for _, labels_N in targets],
            [placed.size for placed in made],
            [self.split.image_ids[index] for index, *_ in drawn],
        )

    def _drawn(self, position: int) -> tuple[int, bool, np.random.Generator]:
        """The index of the image at this position of the stream, whether it may be mixed with others, and its generator."""
        epoch, within = divmod(position, len(self.split))
        index = int(_permutation(len(self.split), self.seed, epoch)[within])
        return index, position < self.mixed_until, np.random.default_rng([self.seed, epoch, index])

    def _made(self, index: int, mixed: bool, rng: np.random.Generator, canvas_HWC: Pixels) -> Placed:
        """The image, augmented, on its canvas."""
        placed = self._placed(index, mixed, rng, canvas_HWC)
        if mixed and self.augment.mixup and rng.random() < self.augment.mixup:
            placed = mixup(placed, self._placed(self._any(rng), mixed, rng), rng)
        distort(placed.content_HWC, self.augment.photometric, self.mean, rng)
        return placed

    def _placed(self, index: int, mixed: bool, rng: np.random.Generator, canvas_HWC: Pixels | None = None) -> Placed:
        """One image, or four in one."""
        if mixed and self.augment.mosaic and rng.random() < self.augment.mosaic:
            samples = [self._sample(one) for one in (index, *(self._any(rng) for _ in range(3)))]
            return mosaic(samples, self.spec, self.augment, rng, canvas_HWC)
        return place(self._sample(index, canvas_HWC), self.spec, self.augment, rng, canvas_HWC)

    def _canvases(self) -> Tensor:
        """(B, H, W, 3) uint8 not yet written to; in a worker shared with the training, which else would be sent a copy.

        Where there are no workers it is the memory of a batch that nobody holds any more, if there is one: the operating
        system would empty other memory page by page first.
        """
        shape = (self.batch_size, self.spec.height, self.spec.width, 3)
        if get_worker_info() is not None:
            return torch.empty(shape, dtype=torch.uint8).share_memory_()  # type: ignore[no-untyped-call, no-any-return]
        memory = self._spare.pop() if self._spare else np.empty(shape, np.uint8)
        held = memory[:]  # by the tensor, and so by every view of it
        weakref.finalize(held, self._spare.append, memory)
        return torch.from_numpy(held)

    def _any(self, rng: np.random.Generator) -> int:
        return int(rng.integers(len(self.split)))

    def _sample(self, index: int, canvas_HWC: Pixels | None = None) -> Sample:
        return self.split.sample(index, self.pixels(index, canvas_HWC))


@lru_cache(maxsize=4)
def _permutation(length: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(length)


def start_method() -> str | None:
    """How workers begin: by fork where there is one, also from Python 3.14 on: a fork shares the cache and imports nothing."""
    return "fork" if "fork" in multiprocessing.get_all_start_methods() else None


def _as_it_is(parcel: _Parcel) -> _Parcel:
    return parcel


def training_batches(
    split: CocoSplit,
    spec: ImageSpec,
    augment: AugmentConfig,
    batch_size: int,
    seed: int,
    first_step: int = 0,
    workers: int = 0,
    pixels: Decode | None = None,
    pinned: bool = False,
) -> Generator[Batch, None, None]:
    """Yield the batches of step `first_step`, `first_step` + 1, ... without end.

    A batch depends on its step, `seed` and the settings only. Takes nothing from torch's global random numbers.
    `pixels` gives an image by its index, in place of decoding it. `pinned` images can be copied to a GPU while it computes.
    Raises ValueError where `split` is empty.
    """
    if not len(split):
        raise ValueError("training_batches: the split has no images")
    loader: DataLoader[_Parcel] = DataLoader(
        _Stream(split, spec, augment, batch_size, seed, pixels),
        batch_size=None,  # an item is a batch
        sampler=count(first_step),  # any iterable will do, and this one has no length
        num_workers=workers,
        multiprocessing_context=start_method() if workers else None,
        collate_fn=_as_it_is,  # type: ignore[arg-type]  # declared for lists of items
        pin_memory=pinned,
        generator=torch.Generator(),  # else it would draw its workers' seed from the global generator
    )
    for parcel in loader:
        yield parcel.opened()
