import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from deploy.errors import DeployError
from deploy.image import FITS, ImageSpec, Placement, decode

SPEC = ImageSpec(64, 96, (10, 20, 30))


def encoded(image, **options):
    file = io.BytesIO()
    image.save(file, **options)
    return file.getvalue()


@pytest.fixture
def photo():
    """Every pixel different, so that a flip or a swap of channels shows."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_comes_out_upright(photo, orientation, tmp_path):
    # How a camera would have stored the upright photo under that orientation.
    stored = {
        1: lambda image: image,
        2: lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: lambda image: image.transpose(Image.Transpose.ROTATE_180),
        4: lambda image: image.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: lambda image: image.transpose(Image.Transpose.TRANSPOSE),
        6: lambda image: image.transpose(Image.Transpose.ROTATE_90),
        7: lambda image: image.transpose(Image.Transpose.TRANSVERSE),
        8: lambda image: image.transpose(Image.Transpose.ROTATE_270),
    }[orientation](photo)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / "photo.png"
    stored.save(file, exif=exif)
    for source in (file, str(file), file.read_bytes(), Image.open(file)):
        np.testing.assert_array_equal(np.asarray(decode(source)), np.asarray(photo))


def test_grey_palette_alpha_and_cmyk_become_rgb(photo):
    grey = decode(encoded(photo.convert("L"), format="PNG"))
    assert grey.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(grey)[..., 2], np.asarray(photo.convert("L")))
    few = Image.fromarray(np.asarray(photo) // 128 * 255)
    np.testing.assert_array_equal(decode(encoded(few.quantize(8), format="PNG")), np.asarray(few))
    clear = photo.copy()
    clear.putalpha(100)
    np.testing.assert_array_equal(decode(encoded(clear, format="PNG")), np.asarray(photo))
    red = decode(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), format="JPEG", quality=95))
    assert np.abs(np.asarray(red).astype(int) - [255, 0, 0]).max() < 12


def test_16_bit_grey_is_scaled_not_clipped():
    levels = np.asarray([[0, 255, 256, 32768, 65535]], np.uint16)
    image = decode(encoded(Image.fromarray(levels), format="PNG"))
    np.testing.assert_array_equal(np.asarray(image)[0, :, 0], [0, 0, 1, 128, 255])


def test_floating_point_images_are_refused():
    with pytest.raises(DeployError, match="floating-point"):
        decode(encoded(Image.fromarray(np.ones((4, 4), np.float32)), format="TIFF"))


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"this is text", "not an image Pillow knows"), (b"", "not an image"), ("truncated", "truncated")],
)
def test_unreadable_files_are_named(tmp_path, content, reason):
    file = tmp_path / "broken.jpg"
    if content == "truncated":
        large = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
        content = encoded(large, format="JPEG")[:-1000]
    file.write_bytes(content)
    with pytest.raises(DeployError, match=reason) as caught:
        decode(file)
    assert "broken.jpg" in str(caught.value)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(DeployError, match=r"nowhere\.jpg: no such image file"):
        decode(tmp_path / "nowhere.jpg")


def test_the_image_lies_top_left_and_the_rest_is_padding():
    array, placement = SPEC.prepare(Image.new("RGB", (100, 200), (200, 100, 50)))
    assert array.shape == (64, 96, 3)
    assert array.dtype == np.uint8
    assert placement == Placement(original=(200, 100), content=(64, 32))
    assert (array[:, :32] == (200, 100, 50)).all()
    assert (array[:, 32:] == (10, 20, 30)).all()


def test_an_image_of_the_right_size_is_untouched():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    array, _ = SPEC.prepare(Image.fromarray(pixels))
    np.testing.assert_array_equal(array, pixels)


def test_resizing_down_is_antialiased():
    stripes = np.zeros((64, 960, 3), np.uint8)
    stripes[:, ::2] = 255
    array, placement = SPEC.prepare(Image.fromarray(stripes))
    assert placement.content == (6, 96)
    # Without antialiasing every column would be black or white.
    assert np.abs(array[:6].astype(int) - 127).max() <= 8


def test_small_images_are_enlarged_and_halves_round_up():
    assert SPEC.content_size(10, 10) == (64, 64)
    assert ImageSpec(100, 100, (0, 0, 0)).content_size(200, 101) == (100, 51)  # 50.5
    assert ImageSpec(100, 100, (0, 0, 0)).content_size(1000, 1) == (100, 1)  # 0.1, but no image vanishes


@settings(max_examples=200, deadline=None)
@given(height=st.integers(1, 4000), width=st.integers(1, 4000))
def test_boxes_go_there_and_back(height, width):
    placement = Placement((height, width), SPEC.content_size(height, width))
    assert placement.content[0] <= 64
    assert placement.content[1] <= 96
    assert 64 in placement.content or 96 in placement.content
    whole = np.asarray([[0, 0, width, height], [0.2 * width, 0.3 * height, 0.7 * width, 0.9 * height]], np.float32)
    inside = placement.to_input(whole)
    np.testing.assert_allclose(inside[0], [0, 0, placement.content[1], placement.content[0]], rtol=1e-6)
    np.testing.assert_allclose(placement.to_original(inside), whole, rtol=1e-5)


@pytest.mark.parametrize("size", [(200, 100), (33, 400), (64, 96), (7, 7)])
@pytest.mark.parametrize("fit", FITS)
def test_pixels_and_boxes_agree_on_where_the_image_lies(fit, size):
    """A white rectangle on black, found again in the input by its pixels, lies where its box does."""
    spec = ImageSpec(64, 96, (9, 9, 9), fit)
    pixels = np.zeros((*size, 3), np.uint8)
    (height, width), white = size, np.asarray([0.25, 0.25, 0.75, 0.75], np.float32)
    box = (white * [width, height, width, height]).round().astype(int)
    pixels[box[1] : box[3], box[0] : box[2]] = 255
    array, placement = spec.prepare(Image.fromarray(pixels))
    assert placement == spec.placement(height, width)
    rows, columns = (np.flatnonzero((array[..., 0] > 127).any(axis)) for axis in (1, 0))
    found = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    inside = placement.to_input(np.asarray([box], np.float32))
    np.testing.assert_allclose(inside[0], found, atol=1)
    np.testing.assert_allclose(placement.to_original(inside), [box], rtol=1e-5, atol=1e-4)
    x1, y1, x2, y2 = placement.limits_xyxy.astype(int)
    outside = np.ones((64, 96), bool)
    outside[y1:y2, x1:x2] = False
    assert (array[outside] == 9).all()
    assert not (array[y1:y2, x1:x2] == 9).all(-1).all()


def test_centred_and_stretched():
    photo = Image.new("RGB", (100, 200))
    centred = ImageSpec(64, 97, (0, 0, 0), "centre").placement(200, 100)
    assert (centred.content, centred.start) == ((64, 32), (0, 32))  # of 65 columns 32 are left and 33 right
    array, stretched = ImageSpec(64, 97, (0, 0, 0), "stretch").prepare(photo)
    assert (array.shape, stretched.content, stretched.start) == ((64, 97, 3), (64, 97), (0, 0))


def test_a_fit_is_written_only_where_it_is_not_the_default():
    assert "fit" not in SPEC.to_dict()
    centred = ImageSpec(64, 96, (10, 20, 30), "centre")
    assert ImageSpec.from_dict(centred.to_dict()) == centred != SPEC
    with pytest.raises(DeployError, match="fit must be one of top_left, centre, stretch, not 'left'"):
        ImageSpec.from_dict({**SPEC.to_dict(), "fit": "left"})


def test_boxes_are_clipped_to_the_original():
    placement = Placement(original=(128, 128), content=(64, 64))
    boxes = placement.to_original(np.asarray([[-5, 10, 70, 80]], np.float32))
    np.testing.assert_array_equal(boxes, [[0, 20, 128, 128]])


def test_spec_round_trips_and_refuses_nonsense():
    assert ImageSpec.from_dict(SPEC.to_dict()) == SPEC
    with pytest.raises(DeployError, match=r"height and width .* 0 x 8.*pad_rgb"):
        ImageSpec(0, 8, (0, 0, 256))
    with pytest.raises(DeployError, match="are wanted"):
        ImageSpec.from_dict({"height": 1, "width": 1})
    with pytest.raises(DeployError, match="pad_rgb"):
        ImageSpec.from_dict({"height": 1, "width": 1, "pad_rgb": 3})


def test_an_array_is_an_image(photo):
    pixels = np.asarray(photo)
    assert np.array_equal(np.asarray(decode(pixels)), pixels)
    assert np.array_equal(np.asarray(decode(pixels[..., ::-1])), pixels[..., ::-1])  # as of a BGR frame turned round


@pytest.mark.parametrize(
    "array",
    [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8)],
)
def test_an_array_that_is_no_rgb_image_is_refused(array):
    with pytest.raises(DeployError, match=r"an array must be uint8 RGB of shape \(height, width, 3\), given"):
        decode(array)
