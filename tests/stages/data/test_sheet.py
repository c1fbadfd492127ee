"""The sheet of training images: what it shows is what is learnt from."""

import numpy as np
import pytest
from PIL import Image

from deploy.image import ImageSpec
from stages.artifacts.dataset import Dataset
from stages.data.augment import AugmentConfig
from stages.data.coco import CocoSplit
from stages.data.loader import training_batches
from stages.data.sheet import ACROSS, PANEL_PX, sample_sheet

SPEC = ImageSpec(120, 160, (9, 9, 9))


@pytest.fixture
def split(digits: Dataset) -> CocoSplit:
    return CocoSplit(digits.folder("train"), digits.annotations("train"))


def test_the_first_eight_images(split: CocoSplit, digits: Dataset) -> None:
    bare = split.subset(8, seed=0)
    bare._starts = np.zeros_like(bare._starts)  # no boxes: nothing is drawn over
    sheet = sample_sheet(bare, SPEC, AugmentConfig(flip=0.5), 0, digits.classes)
    assert sheet.size == (ACROSS * (PANEL_PX + 4) - 4, 2 * (180 + 4) - 4)
    (batch,) = (next(iter(training_batches(bare, SPEC, AugmentConfig(flip=0.5), 8, 0))),)
    for number, image_CHW in enumerate(batch.images_BCHW):
        x, y = number % ACROSS * (PANEL_PX + 4), number // ACROSS * 184
        expected = Image.fromarray(image_CHW.permute(1, 2, 0).numpy().copy()).resize(
            (240, 180), Image.Resampling.BICUBIC
        )
        np.testing.assert_array_equal(np.asarray(sheet.crop((x, y, x + 240, y + 180))), np.asarray(expected))


def test_boxes_are_drawn_and_the_second_row_is_after_the_switch(split: CocoSplit, digits: Dataset) -> None:
    mixed = AugmentConfig(mosaic=1.0, switch_off=1.0)
    sheet, plain = (
        np.asarray(sample_sheet(split, SPEC, augment, 0, digits.classes)) for augment in (mixed, AugmentConfig())
    )
    late = np.asarray(sample_sheet(split, SPEC, AugmentConfig(mosaic=1.0), 0, digits.classes))
    assert sheet.shape == plain.shape
    assert np.array_equal(sheet[:180], late[:180])
    assert not np.array_equal(sheet[184:], late[184:])
    assert (sheet[184:, 120:240] == 9).all(-1).any()  # a plate is square: alone on a wide canvas it leaves padding
