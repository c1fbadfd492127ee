"""Rounding to eight bits while training: what a convolution computes, what learns, and what is left afterwards."""

import pytest
import torch
from torch import nn

from pipeline.errors import UserError
from stages.training.fake_quantisation import FakeQuantised, Settled, fake_quantise


def rounded(values, scale, zero, least, most):
    """What a quantise-dequantise pair gives, by its definition."""
    return ((values / scale).round() + zero).clamp(least, most).sub(zero) * scale


@pytest.fixture
def plain():
    torch.manual_seed(0)
    return nn.Conv2d(3, 4, 3, padding=1)


@pytest.mark.parametrize("signed", [False, True])
def test_computes_what_a_pair_around_input_and_weights_does(plain, signed):
    made = FakeQuantised(plain, [(5, 5)], signed).train()
    images = torch.randn(2, 3, 5, 5)
    found = made(images)
    low, high = images.min(), images.max()
    assert made.ranges_S2.tolist() == [[low.item(), high.item()]]
    if signed:
        inside = rounded(images, torch.maximum(-low, high) / 127, 0, -128, 127)
    else:
        scale = (high - low) / 255
        inside = rounded(images, scale, (-low / scale).round(), 0, 255)
    steps = plain.weight.detach().abs().amax((1, 2, 3), keepdim=True) / 127
    weight = rounded(plain.weight, steps, 0, -127, 127)
    torch.testing.assert_close(found, nn.functional.conv2d(inside, weight, plain.bias, padding=1))
    assert (found - plain(images)).abs().max() > 1e-4


def test_gradients_pass_through_the_rounding(plain):
    made = FakeQuantised(plain, [(5, 5)], False).train()
    images = torch.randn(2, 3, 5, 5, requires_grad=True)
    made(images).square().sum().backward()
    assert made.weight is plain.weight
    assert (plain.weight.grad != 0).any()
    assert (images.grad != 0).float().mean() > 0.9


def test_each_size_has_a_range_of_its_own_that_follows_in_training_only(plain):
    made = FakeQuantised(plain, [(8, 8), (4, 4)], False).train()
    made(torch.full((1, 3, 8, 8), 10.0))
    made(torch.full((1, 3, 4, 4), -2.0))
    assert made.ranges_S2.tolist() == [[0, 10], [-2, 0]]
    made(torch.full((1, 3, 8, 8), 20.0))
    assert made.ranges_S2[0].tolist() == pytest.approx([0, 10.5])
    before = made.ranges_S2.clone()
    made.eval()(torch.full((1, 3, 8, 8), 90.0))
    assert torch.equal(made.ranges_S2, before)
    with pytest.raises(ValueError, match="not in list"):
        made(torch.zeros(1, 3, 6, 6))


def test_a_map_of_zeros_stays_finite(plain):
    made = FakeQuantised(plain, [(4, 4)], False).train()
    assert made(torch.zeros(1, 3, 4, 4)).isfinite().all()


@pytest.fixture(params=["retinanet", "fcos"])
def detector(request, build, student_settings, points_settings):
    return build(student_settings if request.param == "retinanet" else points_settings).eval()


def test_a_detector_keeps_its_own_tensors(detector):
    state = {key: value.clone() for key, value in detector.state_dict().items()}
    replaced = fake_quantise(detector, 128, 128, "onnxruntime")
    convolutions = [name for name, one in detector.named_modules() if isinstance(one, nn.Conv2d)]
    assert sorted(replaced) == sorted(convolutions)
    assert all(isinstance(detector.get_submodule(name), FakeQuantised) for name in replaced)
    after = detector.state_dict()
    assert all(torch.equal(after[key], value) for key, value in state.items())
    assert {key.rpartition(".")[2] for key in after.keys() - state.keys()} == {"ranges_S2"}


def test_a_heads_convolution_has_a_range_a_level(detector):
    fake_quantise(detector, 128, 128, "onnxruntime")
    assert detector.head.classification_head.cls_logits.sizes == [(16, 16), (8, 8), (4, 4), (2, 2)]


def test_normalisation_keeps_its_statistics(detector):
    fake_quantise(detector, 128, 128, "onnxruntime")
    before = {key: value.clone() for key, value in detector.state_dict().items() if "running" in key}
    detector.train()
    detector.predict(detector.features(torch.randint(0, 256, (2, 3, 128, 128), dtype=torch.uint8)))
    assert before
    assert all(torch.equal(detector.state_dict()[key], value) for key, value in before.items())
    settled = [one for one in detector.modules() if isinstance(one, Settled)]
    assert all(one.weight.requires_grad for one in settled)
    assert not any(one.training for one in settled)


def test_layers_may_be_spared(detector):
    replaced = fake_quantise(detector, 128, 128, "tensorrt", ["head.*"])
    assert replaced
    assert not any(name.startswith("head.") for name in replaced)
    with pytest.raises(UserError, match="float_layers: no layer haed"):
        fake_quantise(detector, 128, 128, "tensorrt", ["haed.*"])
