"""Placing a sample: the device's pixels when nothing is asked for, and boxes that go where the pixels go."""

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from deploy.image import ImageSpec
from stages.data.augment import AugmentConfig, Placed, place
from stages.data.coco import Sample

PAD = (7, 77, 177)


def photograph(height: int, width: int) -> Image.Image:
    """Noise and edges: what tells one resize from another."""
    rng = np.random.default_rng(height * 1000 + width)
    pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
    pixels[height // 3 : height // 2] = 255
    pixels[:, width // 2 :: 7] = 0
    return Image.fromarray(pixels)


def sample(image: Image.Image, boxes: list[list[float]]) -> Sample:
    """With labels 0, 1, 2, ..."""
    boxes_N4 = np.asarray(boxes, np.float32).reshape(-1, 4)
    return Sample(np.array(image), (image.height, image.width), boxes_N4, np.arange(len(boxes)), 1)


def placed(given: Sample, spec: ImageSpec, seed: int = 0, **settings: object) -> Placed:
    """Place with a generator of its own."""
    return place(given, spec, AugmentConfig.model_validate(settings), np.random.default_rng(seed))


def marked(height: int, width: int, box: list[int]) -> Image.Image:
    """A black image, the box white."""
    pixels = np.zeros((height, width, 3), np.uint8)
    x1, y1, x2, y2 = box
    pixels[y1:y2, x1:x2] = 255
    return Image.fromarray(pixels)


def white(result: Placed) -> list[int]:
    """The smallest box around what is white of the content."""
    height, width = result.size
    rows, columns = np.nonzero(result.canvas_HWC[:height, :width, 0] > 127)
    return [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]


@pytest.mark.parametrize("size", [(480, 640), (333, 500), (97, 31), (20, 30), (128, 96), (1, 200)])
def test_without_augmentation_it_is_the_devices_input(size: tuple[int, int]) -> None:
    image, spec = photograph(*size), ImageSpec(128, 96, PAD)
    result = placed(sample(image, [[1.0, 0.0, 20.0, 1.0]]), spec)
    expected, placement = spec.prepare(image)
    difference = np.abs(result.canvas_HWC.astype(int) - expected.astype(int))
    assert difference.max() <= 1
    assert result.canvas_HWC.dtype == np.uint8
    assert result.size == placement.content
    boxes = placement.to_input(np.asarray([[1, 0, 20, 1]], np.float32))
    if len(result.targets()[0]):
        np.testing.assert_allclose(result.targets()[0], boxes, atol=1e-5)
    else:  # less than a pixel is left of it
        assert (boxes[0, 2:] - boxes[0, :2]).min() < 1


def test_flip_turns_the_content_and_leaves_the_padding_right() -> None:
    spec = ImageSpec(60, 60, PAD)
    image = marked(60, 40, [3, 10, 13, 30])
    result = placed(sample(image, [[3, 10, 13, 30]]), spec, flip=1.0)
    assert result.targets()[0].tolist() == [white(result)] == [[27, 10, 37, 30]]
    assert result.size == (60, 40)
    assert (result.canvas_HWC[:, 40:] == PAD).all()


def test_flip_is_as_frequent_as_asked() -> None:
    given, spec = sample(marked(8, 8, [0, 0, 2, 8]), [[0, 0, 2, 8]]), ImageSpec(8, 8, PAD)
    flipped = [placed(given, spec, seed, flip=0.25).targets()[0][0, 0] > 0 for seed in range(400)]
    assert 70 < sum(flipped) < 130


def test_shift_moves_boxes_with_pixels_and_mirrors_at_the_border() -> None:
    spec, box = ImageSpec(64, 64, PAD), [18, 30, 30, 44]  # so far inside that its mirror image stays out of view
    image = marked(64, 48, box)
    seen = set()
    for seed in range(60):
        result = placed(sample(image, [box]), spec, seed, shift=8)
        assert result.targets()[0].tolist() == [white(result)]
        x1, y1, x2, y2 = white(result)
        assert (x2 - x1, y2 - y1) == (12, 14)
        seen |= {x1 - 18, 100 + y1 - 30}
        assert (result.canvas_HWC[:, 48:] == PAD).all()
    assert {-8, 8, 92, 108} <= seen <= {*range(-8, 9), *range(92, 109)}


def test_shifted_border_is_the_mirrored_image() -> None:
    image, spec = photograph(32, 32), ImageSpec(32, 32, PAD)
    result = placed(sample(image, [[0, 0, 32, 32]]), spec, seed=1, shift=5)
    padded = np.pad(np.asarray(image), ((5, 5), (5, 5), (0, 0)), mode="reflect")
    windows = [padded[y : y + 32, x : x + 32] for y in range(11) for x in range(11)]
    assert sum(np.array_equal(window, result.canvas_HWC) for window in windows) == 1


def test_box_that_leaves_the_view_is_clipped_or_left_out() -> None:
    spec = ImageSpec(64, 64, PAD)
    boxes = [[0.0, 0.0, 8.0, 8.0], [30.0, 30.0, 40.0, 40.0]]
    given = sample(marked(64, 64, [30, 30, 40, 40]), boxes)
    lengths = set()
    for seed in range(80):
        result = placed(given, spec, seed, shift=8)
        assert (result.targets()[0] >= 0).all()
        assert (result.targets()[0] <= 64).all()
        assert len(result.targets()[0]) == len(result.targets()[1])
        assert result.targets()[1][-1] == 1
        lengths.add(len(result.targets()[1]))
    assert lengths == {1, 2}


def test_smaller_scale_leaves_more_padding() -> None:
    spec = ImageSpec(64, 64, PAD)
    result = placed(sample(marked(64, 64, [16, 16, 48, 32]), [[16, 16, 48, 32]]), spec, scales=(0.5,))
    assert result.size == (32, 32)
    assert result.targets()[0].tolist() == [white(result)] == [[8, 8, 24, 16]]
    assert (result.canvas_HWC[32:] == PAD).all()


def test_larger_scale_shows_a_window_of_the_enlarged_image() -> None:
    spec = ImageSpec(64, 64, PAD)
    given = sample(marked(32, 64, [24, 8, 40, 24]), [[24, 8, 40, 24]])
    corners = set()
    for seed in range(40):
        result = placed(given, spec, seed, scales=(1.5,))
        assert result.canvas_HWC.shape == (64, 64, 3)
        assert result.size == (48, 64)  # 96 wide, of which 64 are in view; 48 high
        np.testing.assert_allclose(result.targets()[0], [white(result)], atol=1)
        corners.add(float(result.targets()[0][0, 0]))
    assert len(corners) > 10


def test_every_scale_is_drawn() -> None:
    given, spec = sample(photograph(16, 16), []), ImageSpec(16, 16, PAD)
    assert {placed(given, spec, seed, scales=(0.5, 0.75, 1.0)).size[0] for seed in range(40)} == {8, 12, 16}


def test_jitter_draws_between_its_ends() -> None:
    given, spec = sample(photograph(64, 64), []), ImageSpec(64, 64, PAD)
    heights = [placed(given, spec, seed, jitter=(0.5, 0.75)).size[0] for seed in range(60)]
    assert min(heights) in range(32, 35)
    assert max(heights) in range(46, 49)
    assert sum(height < 64 * (0.5 * 0.75) ** 0.5 for height in heights) in range(20, 41)  # even by the logarithm


def test_no_jitter_draws_nothing() -> None:
    """The stream of random numbers is what it was before the setting existed, and so are all results."""
    given, spec = sample(photograph(40, 64), []), ImageSpec(64, 64, PAD)
    rng = np.random.default_rng(3)
    place(given, spec, AugmentConfig(flip=0.5, shift=4), rng)
    other = np.random.default_rng(3)
    other.random(), other.integers(-4, 4, 2, endpoint=True)
    assert rng.random() == other.random()


def test_an_image_decoded_on_its_canvas_is_as_one_that_was_not() -> None:
    spec, image = ImageSpec(64, 64, PAD), photograph(48, 64)
    for settings in ({}, {"flip": 1.0}, {"shift": 5}, {"jitter": (1.5, 1.5)}, {"jitter": (0.5, 0.5)}):
        canvas_HWC = np.full((64, 64, 3), 99, np.uint8)
        canvas_HWC[:48] = np.asarray(image)
        there = sample(image, [[5, 5, 30, 30]])._replace(pixels_HWC=canvas_HWC[:48])
        config = AugmentConfig.model_validate(settings)
        on_canvas = place(there, spec, config, np.random.default_rng(0), canvas_HWC)
        apart = placed(sample(image, [[5, 5, 30, 30]]), spec, **settings)
        np.testing.assert_array_equal(on_canvas.canvas_HWC, apart.canvas_HWC)
        np.testing.assert_array_equal(on_canvas.targets()[0], apart.targets()[0])


def test_same_generator_same_result() -> None:
    given, spec = sample(photograph(50, 70), [[5, 5, 30, 30]]), ImageSpec(64, 64, PAD)
    settings = {"flip": 0.5, "shift": 6, "scales": (0.7, 1.0, 1.4)}
    first, again = placed(given, spec, 5, **settings), placed(given, spec, 5, **settings)
    np.testing.assert_array_equal(first.canvas_HWC, again.canvas_HWC)
    np.testing.assert_array_equal(first.targets()[0], again.targets()[0])


@pytest.mark.parametrize(
    "settings",
    [
        {"flip": 1.5},
        {"shift": -1},
        {"scales": ()},
        {"scales": (0.0,)},
        {"jitter": (1.2, 0.8)},
        {"mosaic": 2},
        {"switch_off": 3},
    ],
)
def test_impossible_settings(settings: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        AugmentConfig.model_validate(settings)


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_what_was_cut_away_does_not_come_back_with_a_shift(flip: float) -> None:
    """A shift fills its border with the crop's mirror image: no object is there that lies beyond the crop."""
    given, spec = sample(marked(48, 64, [0, 0, 12, 48]), [[0, 0, 12, 48]]), ImageSpec(48, 64, PAD)
    seen = 0
    for seed in range(300):
        result = placed(given, spec, seed, scales=(1.5,), shift=16, flip=flip)
        for x1, y1, x2, y2 in result.targets()[0].round().astype(int):
            assert (result.canvas_HWC[y1:y2, x1:x2] > 127).mean() > 0.9
            seen += 1
    assert seen > 50
