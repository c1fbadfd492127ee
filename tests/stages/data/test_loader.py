"""Training batches: step k is the same after a resume and with any number of workers."""

from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Literal

import pytest
import torch

from deploy.image import ImageSpec
from stages import dataset
from stages.data.augment import AugmentConfig
from stages.data.cache import PixelCache
from stages.data.coco import CocoSplit
from stages.data.loader import Batch, Decode, training_batches

SPEC = ImageSpec(64, 80, (9, 9, 9))
AUGMENT = AugmentConfig(flip=0.5, shift=4, scales=(0.8, 1.0, 1.3))
ALL = AugmentConfig.model_validate(
    {
        "flip": 0.5,
        "shift": 4,
        "jitter": (0.7, 1.4),
        "photometric": {"probability": 0.7},
        "mosaic": 0.5,
        "mixup": 0.4,
        "switch_off": 1.5,
    }
)


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> CocoSplit:
    directory: Path = tmp_path_factory.mktemp("digits")
    config = dataset.Config.model_validate({"source": {"name": "digits", "train": 10, "val": 1}, "size": 64})
    data = dataset.run(config, directory).placed(directory)
    return CocoSplit(data.folder("train"), data.annotations("train"))


def steps(
    split: CocoSplit,
    count: int,
    first: int = 0,
    workers: int = 0,
    seed: int = 0,
    augment: AugmentConfig = AUGMENT,
    pixels: Decode | None = None,
) -> list[Batch]:
    """Some steps of batches of 4."""
    return list(islice(training_batches(split, SPEC, augment, 4, seed, first, workers, pixels), count))


def assert_equal(some: list[Batch], others: list[Batch]) -> None:
    """Every tensor of every batch is the same."""
    assert len(some) == len(others) > 0
    for one, other in zip(some, others, strict=True):
        assert torch.equal(one.images_BCHW, other.images_BCHW)
        assert torch.equal(one.sizes_B2, other.sizes_B2)
        assert one.image_ids == other.image_ids
        for left, right in zip(one.boxes + one.labels, other.boxes + other.labels, strict=True):
            assert torch.equal(left, right)


def test_batch(split: CocoSplit) -> None:
    (batch,) = steps(split, 1)
    assert batch.images_BCHW.shape == (4, 3, 64, 80)
    assert batch.images_BCHW.dtype == torch.uint8
    assert batch.images_BCHW.is_contiguous(memory_format=torch.channels_last)
    assert batch.sizes_B2.shape == (4, 2)
    assert batch.sizes_B2.dtype == torch.int64
    for boxes, labels, (height, width) in zip(batch.boxes, batch.labels, batch.sizes_B2.tolist(), strict=True):
        assert boxes.shape == (len(labels), 4)
        assert boxes.dtype == torch.float32
        assert labels.dtype == torch.int64
        assert (boxes <= torch.tensor([width, height, width, height])).all()


@pytest.mark.parametrize("augment", [AUGMENT, ALL])
def test_resumed_in_the_middle_of_an_epoch(split: CocoSplit, augment: AugmentConfig) -> None:
    assert_equal(steps(split, 9, augment=augment)[4:], steps(split, 5, first=4, augment=augment))


def test_memory_is_used_again_only_when_nobody_holds_a_part_of_it(split: CocoSplit) -> None:
    batches = training_batches(split, SPEC, AUGMENT, 4, seed=0)
    corner = next(batches).images_BCHW[2, 1:, 5:9]  # a view is all that is left of the first batch
    as_it_was, kept = corner.clone(), {corner.untyped_storage().data_ptr()}
    later = [next(batches).images_BCHW.untyped_storage().data_ptr() for _ in range(6)]
    assert torch.equal(corner, as_it_was)
    assert not kept & set(later)
    assert len(set(later)) <= 3
    del corner
    assert kept <= {next(batches).images_BCHW.untyped_storage().data_ptr() for _ in range(4)}


def test_workers_change_nothing(split: CocoSplit) -> None:
    assert_equal(steps(split, 6, augment=ALL), steps(split, 6, workers=2, augment=ALL))


def test_switched_off_at_its_epoch_and_not_before(split: CocoSplit) -> None:
    """Position 15 of 10 images an epoch, which is within step 3 of 4 images."""
    always = ALL.model_copy(update={"switch_off": None, "mosaic": 1.0})
    until = ALL.model_copy(update={"mosaic": 1.0})
    never = AugmentConfig.model_validate(ALL.model_dump() | {"mosaic": 0.0, "mixup": 0.0, "switch_off": None})
    a, b, c = (steps(split, 6, augment=augment) for augment in (always, until, never))
    assert_equal(a[:3], b[:3])
    assert_equal(b[4:], c[4:])
    same_as_on = [torch.equal(b[3].images_BCHW[i], a[3].images_BCHW[i]) for i in range(4)]
    assert same_as_on == [True, True, True, False]
    assert not torch.equal(b[2].images_BCHW, c[2].images_BCHW)


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("augment", [AugmentConfig(flip=0.5, shift=4), AUGMENT, ALL])
def test_a_cache_changes_nothing(
    split: CocoSplit, tmp_path: Path, where: Literal["memory", "disk"], augment: AugmentConfig
) -> None:
    cache = PixelCache(split, where, tmp_path, SPEC if augment.one_size else None)
    plain = steps(split, 6, augment=augment)
    assert_equal(steps(split, 6, augment=augment, pixels=cache), plain)
    assert_equal(steps(split, 6, augment=augment, pixels=cache), plain)
    assert not list(tmp_path.iterdir())


def test_workers_share_the_cache_and_decode_nothing_twice(split: CocoSplit, tmp_path: Path) -> None:
    plain = AugmentConfig(flip=0.5)
    cache = PixelCache(split, "memory", tmp_path, SPEC)
    before = steps(split, 6, workers=2, augment=plain, pixels=cache)
    cache.split = split.subset(1, seed=0)  # what is not in the cache cannot be had any more
    assert_equal(steps(split, 6, augment=plain, pixels=cache), before)


def test_other_seed_other_batches(split: CocoSplit) -> None:
    assert steps(split, 1)[0].image_ids != steps(split, 1, seed=1)[0].image_ids


def test_every_image_once_an_epoch_in_ever_new_order_and_form(split: CocoSplit) -> None:
    """10 images in batches of 4: an epoch ends inside a batch, and nothing is lost or seen twice."""
    batches = steps(split, 5)  # two epochs
    order = [image_id for batch in batches for image_id in batch.image_ids]
    assert Counter(order[:10]) == Counter(order[10:]) == Counter(split.image_ids)
    assert order[:10] != order[10:]
    images = torch.cat([batch.images_BCHW for batch in batches])
    again = [torch.equal(images[i], images[10 + order[10:].index(order[i])]) for i in range(10)]
    assert not all(again)  # augmented anew


def test_global_random_numbers_are_left_alone(split: CocoSplit) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    steps(split, 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_batch_larger_than_the_split(split: CocoSplit) -> None:
    small = split.subset(3, seed=0)
    batch = next(training_batches(small, SPEC, AUGMENT, 7, 0))
    assert max(Counter(batch.image_ids).values()) == 3
    assert set(batch.image_ids) == set(small.image_ids)
