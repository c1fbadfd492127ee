"""FGD against its reference code and against numpy; its masks and attention."""

import math

import numpy as np
import pytest
import torch

from stages.distillation.methods.fgd import FGD, Context, FocalGlobal, attention, masks

PRECISIONS = [(torch.float64, 1e-9), (torch.float32, 1e-5)]
FILES = [
    "fgd_basic",
    "fgd_align_channels",
    "fgd_box_whole_image",
    "fgd_init_params",
    "fgd_padded_noboxes",
    "fgd_twostage_weights",
]


def of_reference(numbers, settings, on_maps, dtype):
    mine = numbers["S"].to(dtype).requires_grad_()
    config = {
        "foreground": settings["alpha_fgd"],
        "background": settings["beta_fgd"],
        "attention": settings["gamma_fgd"],
        "relation": settings["lambda_fgd"],
        "temperature": settings["temp"],
    }
    boxes = list(numbers["boxes"].to(dtype).split(numbers["n_boxes"].tolist()))
    method, batch = on_maps(FGD, config, [mine], [numbers["T"].to(dtype)], boxes)
    (loss,) = method.losses
    names = {"context_student": "s", "context_teacher": "t"}
    parameters = {}
    for name, side in names.items():
        context = getattr(loss, name)
        parameters |= {f"conv_mask_{side}.{k}": p for k, p in context.mask.named_parameters()}
        parameters |= {f"channel_add_conv_{side}.{k}": p for k, p in context.add.named_parameters()}
    parameters |= {f"align.{k}": p for k, p in method.maps.adapters.named_parameters(prefix="")}
    parameters = {k.replace("align.0.", "align."): p for k, p in parameters.items()}
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(numbers[f"param_{key}"])
    return method, batch, mine, parameters


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("name", FILES)
def test_equals_the_reference_code(reference, on_maps, assert_near, name, dtype, tolerance):
    numbers, settings = reference(name)
    method, batch, mine, parameters = of_reference(numbers, settings, on_maps, dtype)
    sizes = [
        tuple(shape) for shape in numbers["img_shapes"].tolist()
    ]  # the original's scale, which drifts with padding
    ((student, teacher),) = method.maps(batch.features, batch.teacher_features)
    terms = method.losses[0](student, teacher, batch.targets.boxes, sizes)
    for term, wanted in zip(terms, ("fg", "bg", "mask", "rela"), strict=True):
        assert_near(term, numbers[f"loss_{wanted}"], tolerance)
    total = sum(getattr(method.config, key) * term for key, term in terms._asdict().items())
    total.backward()
    assert_near(total, numbers["loss"], tolerance)
    assert_near(mine.grad, numbers["grad_S"], tolerance)
    assert {f"param_{key}" for key in parameters} == {key for key in numbers if key.startswith("param_")}
    largest = max(value.abs().max().item() for key, value in numbers.items() if key.startswith("grad_param_"))
    for key, parameter in parameters.items():
        assert_near(parameter.grad, numbers[f"grad_param_{key}"], tolerance, scale=largest)


@pytest.mark.parametrize("name", FILES)
def test_masks_and_attention_equal_the_reference_code(reference, assert_near, name):
    numbers, settings = reference(name)
    sizes = [tuple(shape) for shape in numbers["img_shapes"].tolist()]
    boxes = numbers["boxes"].split(numbers["n_boxes"].tolist())
    found = masks(boxes, sizes, tuple(numbers["T"].shape[-2:]), numbers["T"])
    assert_near(found[0], numbers["mask_fg"])
    assert_near(found[1], numbers["mask_bg"])
    spatial, channels = attention(numbers["T"], settings["temp"])
    assert_near(spatial, numbers["S_attention_t"])
    assert_near(channels, numbers["C_attention_t"])


def test_boxes_are_laid_where_they_are_on_the_padded_canvas(reference, on_maps, assert_near):
    """With images that fill the canvas the method is the original; with padding it is not, and that is the original's
    drift: it divides by the size of the image though the map covers the padding too."""
    numbers, settings = reference("fgd_padded_noboxes")
    method, batch, *_ = of_reference(numbers, settings, on_maps, torch.float64)
    batch.features = type(batch.features)((), batch.features.levels, (96, 128))
    ours = method(batch)["foreground"] / settings["alpha_fgd"]
    ((student, teacher),) = method.maps(batch.features, batch.teacher_features)
    right = method.losses[0](student, teacher, batch.targets.boxes, [(96, 128)] * 3).foreground
    assert_near(ours, right)
    assert ours.item() != pytest.approx(numbers["loss_fg"].item(), rel=1e-3)
    # By hand: a box of pixels 70 to 88 at stride 16 covers columns 4 to 6 of the map, and the original's 6 to 8.
    foreground, _ = masks([batch.targets.boxes[2][1:2]], [(96, 128)], (6, 8), teacher)
    assert foreground[0].amax(0).nonzero().flatten().tolist() == [4, 5, 6]


@pytest.fixture
def maps():
    number = torch.arange(2 * 4 * 3 * 5).double().view(2, 4, 3, 5)
    return torch.sin(number * 0.7), 2 * torch.cos(number * 1.3)


BOXES = [torch.tensor([[8.0, 8, 24, 17], [20.0, 10, 39, 23]]).double(), torch.zeros(0, 4).double()]


def by_numpy(mine, theirs):
    """The equation on a canvas of (24, 40) pixels, stride 8, place by place; the context blocks add nothing yet."""
    s, t = mine.numpy(), theirs.numpy()

    def weights(x):
        e = np.exp(np.abs(x) / 0.5)
        return e.size * e / e.sum()

    totals = dict.fromkeys(("foreground", "background", "attention", "relation"), 0.0)
    for b in range(2):
        fg = np.zeros((3, 5))
        for x1, y1, x2, y2 in BOXES[b].numpy() / 8:
            rows = range(math.floor(y1), math.ceil(y2) + 1)
            columns = range(math.floor(x1), math.ceil(x2) + 1)
            for r in rows:
                for c in columns:
                    if r < 3 and c < 5:
                        fg[r, c] = max(fg[r, c], 1 / len(rows) / len(columns))
        bg = (fg == 0) / max((fg == 0).sum(), 1)
        places, channels = weights(np.abs(t[b]).mean(0)), weights(np.abs(t[b]).mean((1, 2)))
        error = (s[b] - t[b]) ** 2 * channels[:, None, None] * places
        totals["foreground"] += (error * fg).sum() / 2
        totals["background"] += (error * bg).sum() / 2
        totals["attention"] += np.abs(weights(np.abs(s[b]).mean(0)) - places).sum() / 2
        totals["attention"] += np.abs(weights(np.abs(s[b]).mean((1, 2))) - channels).sum() / 2
        totals["relation"] += ((s[b] - t[b]) ** 2).sum() / 2
    return totals


def test_golden_numbers(on_maps, maps):
    mine, theirs = maps
    weights = {"foreground": 1.0, "background": 2.0, "attention": 3.0, "relation": 4.0}
    method, batch = on_maps(FGD, weights, [mine], [theirs], BOXES, (24, 40))
    wanted = by_numpy(mine, theirs)
    found = {name: term.item() for name, term in method(batch).items()}
    assert found == pytest.approx({name: weights[name] * term for name, term in wanted.items()}, rel=1e-9)


def test_golden_context(maps):
    """The map plus two linear layers, normalised between, of its mean weighted by where the mask is large."""
    torch.manual_seed(0)
    block = Context(4).double()
    assert torch.equal(block(maps[0]), maps[0])  # as published, it begins by adding nothing
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    x = maps[0].numpy().reshape(2, 4, -1)
    mask, mask_bias, first, first_bias, scale, shift, last, last_bias = (
        p.detach().numpy().squeeze() for p in block.parameters()
    )
    weight = np.exp(np.einsum("c,bcp->bp", mask, x) + mask_bias)
    pooled = np.einsum("bcp,bp->bc", x, weight / weight.sum(1, keepdims=True))
    hidden = pooled @ first.T + first_bias
    hidden = (hidden - hidden.mean(1, keepdims=True)) / np.sqrt(hidden.var(1, keepdims=True) + 1e-5) * scale + shift
    wanted = x + (np.maximum(hidden, 0) @ last.T + last_bias)[:, :, None]
    assert block(maps[0]).detach().numpy().reshape(2, 4, -1) == pytest.approx(wanted, rel=1e-9)


def test_both_sides_have_a_context_of_their_own(maps):
    loss = FocalGlobal(4, 0.5).double()
    plain = loss(*maps, BOXES, [(24, 40)] * 2).relation
    for context in (loss.context_student, loss.context_teacher):
        with torch.no_grad():
            context.add[-1].bias.fill_(1)
    torch.testing.assert_close(loss(*maps, BOXES, [(24, 40)] * 2).relation, plain)  # the same on both sides
    with torch.no_grad():
        loss.context_teacher.add[-1].bias.zero_()
    shifted = (maps[0] + 1 - maps[1]).square().sum() / 2
    torch.testing.assert_close(loss(*maps, BOXES, [(24, 40)] * 2).relation, shifted)


def test_attention_sums_to_the_number_of_what_it_weighs(maps):
    spatial, channels = attention(maps[0], 0.5)
    assert spatial.sum((1, 2)).tolist() == pytest.approx([15, 15])
    assert channels.sum(1).tolist() == pytest.approx([4, 4])


def test_on_the_teachers_own_map_it_is_zero(maps):
    _, theirs = maps
    terms = FocalGlobal(4, 0.5).double()(theirs, theirs, BOXES, [(24, 40)] * 2)
    assert [term.item() for term in terms] == [0, 0, 0, 0]


def test_a_box_over_the_whole_image_leaves_no_background(maps):
    whole = [torch.tensor([[0.0, 0, 40, 24]])]
    foreground, background = masks(whole, [(24, 40)], (3, 5), maps[0])
    assert (foreground > 0).all()
    assert background.sum() == 0


def test_without_objects_all_is_background(maps):
    foreground, background = masks([torch.zeros(0, 4)], [(24, 40)], (3, 5), maps[0])
    assert foreground.sum() == 0
    assert background[0].tolist() == [[pytest.approx(1 / 15)] * 5] * 3


def test_gradient_is_that_of_finite_differences(maps):
    mine, theirs = maps
    torch.manual_seed(0)
    loss = FocalGlobal(4, 0.5).double()
    torch.nn.init.normal_(loss.context_student.add[-1].weight)
    assert torch.autograd.gradcheck(lambda s: sum(loss(s, theirs, BOXES, [(24, 40)] * 2)), mine.requires_grad_())


def test_no_gradient_for_the_teacher_and_one_place_is_finite(maps):
    mine, theirs = (m[:1, :, :1, :1].clone().requires_grad_() for m in maps)
    terms = FocalGlobal(4, 0.5).double()(mine, theirs, BOXES[1:], [(8, 8)])
    sum(terms).backward()
    assert all(term.isfinite() for term in terms)
    assert mine.grad.isfinite().all()
    assert theirs.grad is None
