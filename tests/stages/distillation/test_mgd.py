"""MGD against its reference code and against numpy; its mask."""

import numpy as np
import pytest
import torch
from torch import nn

from stages.distillation.methods.mgd import MGD, generator, mgd_loss

PRECISIONS = [(torch.float64, 1e-9), (torch.float32, 1e-5)]


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("name", ["mgd_basic", "mgd_align", "mgd_ratio045_edge"])
def test_equals_the_reference_code(reference, on_maps, assert_near, monkeypatch, name, dtype, tolerance):
    numbers, settings = reference(name)
    mine = numbers["S"].to(dtype).requires_grad_()
    config = {"weight": settings["alpha_mgd"], "ratio": settings["lambda_mgd"]}
    method, batch = on_maps(MGD, config, [mine], [numbers["T"].to(dtype)])
    parts = {"generation": method.generators[0], "align": method.maps.adapters[0]}
    for part, module in parts.items():
        own = {k.removeprefix(f"param_{part}."): v for k, v in numbers.items() if k.startswith(f"param_{part}.")}
        module.load_state_dict(own)
    # The numbers that the original drew stay in their precision: one of them lies on the threshold.
    monkeypatch.setattr(torch, "rand_like", lambda like: numbers["rand"])
    loss = method(batch)["feature"]
    loss.backward()
    assert_near(loss, numbers["loss"], tolerance)
    assert_near(mine.grad, numbers["grad_S"], tolerance)
    for part, module in parts.items():
        for key, parameter in module.named_parameters():
            assert_near(parameter.grad, numbers[f"grad_param_{part}.{key}"], tolerance)


@pytest.fixture
def maps():
    number = torch.arange(120).double().view(2, 3, 4, 5)
    return torch.sin(number * 0.7), torch.cos(number * 1.3), torch.sin(number[:, :1] * 91).abs()


def test_golden_number(maps):
    """With convolutions whose centre alone is not 0, so that numpy needs no convolution."""
    mine, theirs, chance = maps
    layers = generator(3).double()
    with torch.no_grad():
        for number, layer in enumerate((layers[0], layers[2])):
            layer.weight.zero_()[:, :, 1, 1] = torch.arange(9.0).view(3, 3) / 4 - number
            layer.bias.copy_(torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64))
    first, second = (np.arange(9.0).reshape(3, 3) / 4 - number for number in (0, 1))
    bias = np.array([0.1, -0.2, 0.3])[None, :, None, None]
    masked = mine.numpy() * np.where(chance.numpy() > 0.35, 0, 1)
    hidden = np.maximum(np.einsum("oc,bchw->bohw", first, masked) + bias, 0)
    made = np.einsum("oc,bchw->bohw", second, hidden) + bias
    wanted = ((made - theirs.numpy()) ** 2).sum() / 2
    assert mgd_loss(layers, mine, theirs, chance, 0.65).item() == pytest.approx(wanted, rel=1e-12)


def test_masks_whole_places_in_the_share_that_was_asked_for(on_maps):
    seen = []
    mine = torch.ones(2, 4, 100, 100)
    method, batch = on_maps(MGD, {"ratio": 0.65}, [mine], [mine])
    method.generators[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    torch.manual_seed(0)
    method(batch)
    (masked,) = seen
    assert torch.equal(masked.amin(1), masked.amax(1))
    assert 1 - masked.mean().item() == pytest.approx(0.65, abs=0.02)


def test_the_mask_is_new_each_step_and_that_of_the_seed(on_maps, maps):
    mine, theirs, _ = maps
    method, batch = on_maps(MGD, {}, [mine], [theirs])
    torch.manual_seed(3)
    first, second = (method(batch)["feature"].item() for _ in range(2))
    torch.manual_seed(3)
    assert method(batch)["feature"].item() == first
    assert first != second


def test_nothing_masked_and_an_identity_for_generator_leave_the_squared_error(maps):
    mine, theirs, chance = maps
    wanted = (mine - theirs).square().sum() / 2
    assert mgd_loss(nn.Identity(), mine, theirs, chance, 0.0).item() == pytest.approx(wanted.item())
    assert mgd_loss(nn.Identity(), theirs, theirs, chance, 0.0).item() == 0


def test_gradient_is_that_of_finite_differences_and_none_passes_the_mask(maps):
    mine, theirs, chance = (m[:, :, :3, :3].clone() for m in maps)
    torch.manual_seed(0)
    layers = generator(3).double()
    assert torch.autograd.gradcheck(lambda s: mgd_loss(layers, s, theirs, chance, 0.65), mine.requires_grad_())
    mgd_loss(layers, mine, theirs.requires_grad_(), chance, 0.65).backward()
    assert theirs.grad is None
    assert (mine.grad[(chance > 0.35).expand_as(mine)] == 0).all()
    assert (mine.grad[(chance <= 0.35).expand_as(mine)] != 0).any()


def test_a_map_of_one_place_is_finite(on_maps, maps):
    method, batch = on_maps(MGD, {}, [maps[0][:1, :, :1, :1]], [maps[1][:1, :, :1, :1]])
    assert method(batch)["feature"].isfinite()
