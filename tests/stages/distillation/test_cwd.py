"""CWD against its reference code, against numpy, and its invariances."""

import numpy as np
import pytest
import torch

from stages.distillation.methods.cwd import CWD, cwd_loss

PRECISIONS = [(torch.float64, 1e-9), (torch.float32, 1e-5)]


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("name", ["cwd_tau0.5", "cwd_tau1", "cwd_tau4", "cwd_dead_channel", "cwd_peaky"])
def test_equals_the_reference_code(reference, on_maps, assert_near, name, dtype, tolerance):
    numbers, settings = reference(name)
    mine = numbers["S"].to(dtype).requires_grad_()
    config = {"weight": settings["loss_weight"], "tau": settings["tau"]}
    method, batch = on_maps(CWD, config, [mine], [numbers["T"].to(dtype)])
    loss = method(batch)["feature"]
    loss.backward()
    assert_near(loss, numbers["loss"], tolerance)
    assert_near(mine.grad, numbers["grad_S"], tolerance)


@pytest.fixture
def maps():
    number = torch.arange(120).double().view(2, 3, 4, 5)
    return 2 * torch.sin(number * 0.7), 3 * torch.cos(number * 1.3)


def test_golden_number(on_maps, maps):
    def distribution(x):
        e = np.exp(x.numpy().reshape(2, 3, -1) / 2)
        return e / e.sum(2, keepdims=True)

    mine, theirs = maps
    s, t = distribution(mine), distribution(theirs)
    wanted = 5 * 2**2 / (2 * 3) * (t * np.log(t / s)).sum()
    method, batch = on_maps(CWD, {"weight": 5, "tau": 2}, [mine, mine], [theirs, theirs])
    assert method(batch)["feature"].item() == pytest.approx(2 * wanted, rel=1e-12)  # a sum over levels


def test_ignores_shift_but_not_scale(maps):
    mine, theirs = maps
    shift = torch.tensor([3.0, -1.0, 9.0]).view(1, 3, 1, 1)
    assert cwd_loss(mine + shift, theirs).item() == pytest.approx(cwd_loss(mine, theirs).item(), rel=1e-12)
    assert cwd_loss(2 * mine, theirs).item() != pytest.approx(cwd_loss(mine, theirs).item(), rel=1e-2)


def test_extremes(maps):
    mine, theirs = maps
    assert cwd_loss(theirs, theirs).item() == 0
    assert cwd_loss(mine, theirs).item() > 0
    assert cwd_loss(mine[..., :1, :1], theirs[..., :1, :1]).item() == 0  # one place holds all of every channel
    assert cwd_loss(1e4 * mine, theirs).isfinite()


def test_gradient_is_that_of_finite_differences(maps):
    mine, theirs = (m[:, :2, :3, :3].clone() for m in maps)
    assert torch.autograd.gradcheck(lambda s: cwd_loss(s, theirs, 2.0), mine.requires_grad_())


def test_channels_and_sizes_may_differ(on_maps, maps):
    mine, theirs = maps
    method, batch = on_maps(
        CWD, {"pairing": "index"}, [mine[:, :2, :2, :3].requires_grad_()], [theirs.requires_grad_()]
    )
    method(batch)["feature"].backward()
    assert method.maps.adapters[0].weight.grad.isfinite().all()
    assert theirs.grad is None
