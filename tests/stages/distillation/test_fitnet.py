"""FitNet against its reference code, and as plain imitation of all stages."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipeline.errors import UserError
from stages.detection.records import Features
from stages.distillation.methods.fitnet import FitNet

PRECISIONS = [(torch.float64, 1e-9), (torch.float32, 1e-5)]


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize(
    ("name", "levels", "adapters"),
    [("fitnet_five_adapters", 5, "separate"), ("fitnet_shared_adapter", 3, "shared")],
)
def test_equals_the_reference_code(reference, on_maps, assert_near, name, levels, adapters, dtype, tolerance):
    numbers, settings = reference(name)
    mine = [numbers[f"S{k}"].to(dtype).requires_grad_() for k in range(levels)]
    theirs = [numbers[f"T{k}"].to(dtype) for k in range(levels)]
    method, batch = on_maps(FitNet, {"weight": settings["weight"], "adapters": adapters}, mine, theirs)
    assert len(method.maps.adapters) == (5 if adapters == "separate" else 1)
    for k, adapter in enumerate(method.maps.adapters):
        adapter.load_state_dict({part: numbers[f"adapter{k}_{part}"] for part in ("weight", "bias")})
    loss = method(batch)["neck"]
    loss.backward()
    assert_near(loss, numbers["loss_sum"], tolerance)
    for k, level in enumerate(mine):
        assert_near(level.grad, numbers[f"grad_S{k}"], tolerance)
    for k, adapter in enumerate(method.maps.adapters):
        assert_near(adapter.weight.grad, numbers[f"grad_adapter{k}_weight"], tolerance)
        assert_near(adapter.bias.grad, numbers[f"grad_adapter{k}_bias"], tolerance)


@pytest.fixture
def maps():
    number = torch.arange(120).double().view(2, 3, 4, 5)
    return torch.sin(number * 0.7), torch.cos(number * 1.3)


def test_golden_number(on_maps, maps):
    mine, theirs = maps
    method, batch = on_maps(FitNet, {"weight": 0.5}, [mine, mine[..., :2]], [theirs, theirs[..., :2]])
    wanted = 0.0
    for k, adapter in enumerate(method.maps.adapters):
        weight, bias = (p.detach().numpy() for p in (adapter.weight[:, :, 0, 0], adapter.bias))
        s, t = (level[k].numpy() for level in (batch.features.levels, batch.teacher_features.levels))
        adapted = np.einsum("oc,bchw->bohw", weight, s) + bias[None, :, None, None]
        wanted += 0.5 * ((adapted - t) ** 2).mean()
    assert method(batch)["neck"].item() == pytest.approx(wanted, rel=1e-12)


def test_is_zero_when_adapted_to_the_teacher_and_gives_it_no_gradient(on_maps, maps):
    mine, theirs = maps[0].requires_grad_(), (2 * maps[0] + 1).detach().requires_grad_()
    method, batch = on_maps(FitNet, {}, [mine], [theirs])
    with torch.no_grad():
        method.maps.adapters[0].weight.copy_(2 * torch.eye(3)[:, :, None, None])
        method.maps.adapters[0].bias.fill_(1)
    loss = method(batch)["neck"]
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-24)
    assert theirs.grad is None
    assert mine.grad is not None


def test_gradient_is_that_of_finite_differences(on_maps, maps):
    mine, theirs = (m[:, :, :2, :3].clone() for m in maps)
    method, batch = on_maps(FitNet, {}, [mine], [theirs])

    def loss(level):
        batch.features = Features((), (level,), (64, 64))
        return method(batch)["neck"]

    assert torch.autograd.gradcheck(loss, mine.requires_grad_())


@pytest.mark.parametrize(
    ("stages", "terms"), [("neck", {"neck"}), ("backbone", {"backbone"}), ("all", {"backbone", "neck"})]
)
def test_stages(build, student_settings, teacher_settings, stages, terms):
    student, teacher = (
        build({**student_settings, "neck_channels": 24}),
        build({**teacher_settings, "backbone": "resnet18"}),
    )
    method = FitNet(FitNet.Config(stages=stages), student, teacher)
    images = torch.rand(2, 3, 64, 64) * 255
    batch = SimpleNamespace(features=student.features(images), teacher_features=teacher.features(images))
    losses = method(batch)
    assert losses.keys() == terms
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    reached = {name.split(".")[1] for name, p in student.backbone.named_parameters() if p.grad is not None}
    assert any(name.startswith("layer4") for name in reached)


def test_one_adapter_cannot_serve_backbone_stages(build, student_settings, teacher_settings):
    student, teacher = build(student_settings), build(teacher_settings)
    with pytest.raises(UserError, match="method fitnet: one adapter for all maps needs equal channels"):
        FitNet(FitNet.Config(stages="backbone", adapters="shared"), student, teacher)
