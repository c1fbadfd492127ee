"""Colours: each of the four does what its name says, nothing is done unasked."""

import colorsys

import numpy as np
import pytest
from numpy.typing import NDArray

from stages.data.photometric import PhotometricConfig, colour_matrix, distort, grey_of


def changed(rgb: tuple[float, float, float], *settings: float) -> NDArray[np.float64]:
    """The colour after brightness, contrast, saturation and hue, with 100 as the data's mean."""
    return colour_matrix(*settings, 100.0) @ np.asarray([*rgb, 1.0])  # type: ignore[call-arg]


def test_nothing_is_changed_by_factors_of_one() -> None:
    np.testing.assert_allclose(colour_matrix(1, 1, 1, 0, 100), np.eye(3, 4), atol=1e-12)


def test_each_of_the_four() -> None:
    np.testing.assert_allclose(changed((10, 20, 30), 2, 1, 1, 0), [20, 40, 60])
    np.testing.assert_allclose(changed((100, 110, 90), 1, 1.5, 1, 0), [100, 115, 85])
    np.testing.assert_allclose(changed((10, 200, 30), 1, 1, 0, 0), [grey_of((10, 200, 30))] * 3)
    np.testing.assert_allclose(changed((80, 80, 80), 1, 1, 0.3, 77), [80, 80, 80], atol=0.3)  # grey has no hue
    turned = changed((120, 60, 60), 1, 1, 1, 30)
    assert grey_of(tuple(turned)) == pytest.approx(grey_of((120, 60, 60)), abs=0.3)
    np.testing.assert_allclose(changed(tuple(turned), 1, 1, 1, -30), (120, 60, 60), atol=1e-9)
    before, after = (360 * colorsys.rgb_to_hsv(*rgb)[0] for rgb in ((120, 60, 60), turned))
    assert 20 < (before - after) % 360 < 45  # YIQ counts the other way round, and its angles are not quite those of HSV


def test_pixels_are_changed_in_place_as_the_matrix_says() -> None:
    config = PhotometricConfig(probability=1.0)
    pixels_HWC = np.random.default_rng(1).integers(0, 256, (9, 7, 3), np.uint8)
    wide_HWC = np.zeros((12, 8, 3), np.uint8)
    wide_HWC[:9, :7] = pixels_HWC
    distort(wide_HWC[:9, :7], config, 100.0, np.random.default_rng(5))
    rng = np.random.default_rng(5)
    rng.random()
    ranges = np.asarray([config.brightness, config.contrast, config.saturation, config.hue])
    b, c, s, h = np.asarray([1, 1, 1, 0]) + rng.uniform(-ranges, ranges)
    matrix_34 = colour_matrix(b, c, s, h, 100.0)
    expected_HWC = (pixels_HWC @ matrix_34[:, :3].T + matrix_34[:, 3]).clip(0, 255)
    assert np.abs(wide_HWC[:9, :7] - expected_HWC).max() <= 0.51
    assert not np.array_equal(wide_HWC[:9, :7], pixels_HWC)
    assert not wide_HWC[9:].any()
    assert not wide_HWC[:, 7:].any()


def test_as_often_as_asked() -> None:
    def touched(probability: float) -> int:
        rng, count = np.random.default_rng(0), 0
        for _ in range(200):
            pixels_HWC = np.full((2, 2, 3), (200, 90, 30), np.uint8)
            distort(pixels_HWC, PhotometricConfig(probability=probability), 100.0, rng)
            count += bool((pixels_HWC != (200, 90, 30)).any())
        return count

    assert touched(0.0) == 0
    assert 25 < touched(0.25) < 75
    assert touched(1.0) > 190


def test_switched_off_it_draws_nothing() -> None:
    rng = np.random.default_rng(0)
    distort(np.zeros((2, 2, 3), np.uint8), PhotometricConfig(), 100.0, rng)
    assert rng.random() == np.random.default_rng(0).random()
