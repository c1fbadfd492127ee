"""Mosaic and mixup: boxes lie where their pixels lie, labels stay with their boxes."""

import numpy as np
import pytest

from deploy.image import ImageSpec
from stages.data.augment import AugmentConfig, Laid, Placed, place
from stages.data.coco import Sample
from stages.data.mixing import mixup, mosaic

SPEC = ImageSpec(64, 80, (7, 7, 7))
BRIGHT = (60, 120, 180, 240)
COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0))


def square(number: int) -> Sample:
    """A black image of its own size, with one square in a colour of its own; its label is its number."""
    pixels_HWC = np.zeros((40 + 8 * number, 90 - 10 * number, 3), np.uint8)
    pixels_HWC[10:30, 20:40] = COLOURS[number]
    boxes_N4 = np.asarray([[20, 10, 40, 30]], np.float32)
    return Sample(pixels_HWC, pixels_HWC.shape[:2], boxes_N4, np.asarray([number]), number)


def bounds(mask_HW: np.ndarray) -> list[int]:
    """The smallest box around what is true."""
    rows, columns = np.nonzero(mask_HW)
    return [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]


@pytest.mark.parametrize("flip", [0.0, 1.0])
@pytest.mark.parametrize("seed", range(12))
def test_mosaic(seed: int, flip: float) -> None:
    config = AugmentConfig(mosaic=1.0, mosaic_jitter=(0.5, 1.0), flip=flip)
    made = mosaic([square(number) for number in range(4)], SPEC, config, np.random.default_rng(seed))
    assert made.canvas_HWC.shape == (64, 80, 3)
    assert made.size == (64, 80)
    boxes_N4, labels_N = made.targets()
    assert len(boxes_N4) == len(labels_N) >= 1
    assert len(set(labels_N.tolist())) == len(labels_N)
    for box, label in zip(boxes_N4, labels_N, strict=True):
        mine_HW = ((made.canvas_HWC > 127) == (np.asarray(COLOURS[label]) > 127)).all(-1)
        np.testing.assert_allclose(bounds(mine_HW), box, atol=1)


def test_all_four_are_seen_and_their_centre_moves() -> None:
    plain = [
        Sample(np.full((64, 80, 3), v, np.uint8), (64, 80), np.zeros((0, 4), np.float32), np.zeros(0, int), v)
        for v in BRIGHT
    ]
    centres = set()
    for seed in range(20):
        made = mosaic(plain, SPEC, AugmentConfig(mosaic_jitter=(1, 1)), np.random.default_rng(seed))
        assert {int(made.canvas_HWC[y, x, 0]) for y in (0, -1) for x in (0, -1)} == set(BRIGHT)
        assert set(np.unique(made.canvas_HWC)) == set(BRIGHT)
        x, y = ((made.canvas_HWC[..., 0] == BRIGHT[0]).any(axis).sum() for axis in (0, 1))
        assert 20 <= x <= 60
        assert 16 <= y <= 48
        centres.add((int(x), int(y)))
    assert len(centres) > 10


def test_mosaic_on_the_smallest_canvas() -> None:
    made = mosaic([square(n) for n in range(4)], ImageSpec(2, 2, (7, 7, 7)), AugmentConfig(), np.random.default_rng(0))
    assert made.canvas_HWC.shape == (2, 2, 3)


def flat(level: int, size: tuple[int, int], label: int) -> Placed:
    laid = Laid(np.asarray([[1, 2, 9, 9]], np.float32), np.asarray([label]), (1, 1), (0, 0), (0, 0, size[1], size[0]))
    return Placed(np.full((64, 80, 3), level, np.uint8), (laid,), size)


def test_mixup_blends_and_keeps_all_objects() -> None:
    levels = []
    for seed in range(50):
        made = mixup(flat(100, (64, 50), 3), flat(200, (40, 80), 5), np.random.default_rng(seed))
        assert len(np.unique(made.canvas_HWC)) == 1
        levels.append(int(made.canvas_HWC[0, 0, 0]))
        boxes_N4, labels_N = made.targets()
        assert labels_N.tolist() == [3, 5]
        assert boxes_N4.tolist() == [[1, 2, 9, 9]] * 2
        assert made.size == (64, 80)
    assert 130 < min(levels) < 148
    assert 152 < max(levels) < 170


def test_mixup_does_not_overflow() -> None:
    made = mixup(flat(255, (64, 80), 0), flat(255, (64, 80), 0), np.random.default_rng(0))
    assert (made.canvas_HWC == 255).all()


def test_settings_that_are_off_leave_an_image_alone() -> None:
    a = place(square(0), SPEC, AugmentConfig(), np.random.default_rng(0))
    b = place(square(0), SPEC, AugmentConfig(mosaic=0.5, mixup=0.5, switch_off=1), np.random.default_rng(0))
    np.testing.assert_array_equal(a.canvas_HWC, b.canvas_HWC)
