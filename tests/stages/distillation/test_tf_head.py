"""TF-HEAD: the distillation terms against numbers by its authors' code, and where its gradients and weights end."""

import pytest
import torch
from torch.nn import functional

from pipeline.config import BaseConfig, Choice
from pipeline.errors import UserError
from stages import distill, train
from stages.detection.records import Anchors, DensePredictions, RoIs, Targets
from stages.distillation.assistant import Assistance, MapAssistant, RoIAssistant
from stages.distillation.method import DistillationBatch, DistillationMethod
from stages.distillation.methods.tf_head import TFHEAD, Assisted
from stages.distillation.task import DistillationTask
from stages.training.clock import Clock

EPOCH = 7330
PUBLISHED = {"iterations": 12 * EPOCH, "iterations_per_epoch": EPOCH, "milestones": (8 * EPOCH, 11 * EPOCH)}
RCNN = {"name": "rcnn", "head": {"hidden": 32, "sampling_ratio": 1}}


def fixed(kind, width, assistance):
    """A choice of an assistant that says what it is given."""

    class Fixed(kind):
        Config = BaseConfig

        @classmethod
        def build(cls, config, student, teacher):
            assert teacher is None
            return cls()

        def __init__(self):
            super().__init__()
            self.widths = (width,)

        def forward(self, batch, settings):
            return assistance

        def ask(self, teacher, features, assistance):
            raise AssertionError("nobody is asked")

    return Choice("fixed", Fixed, BaseConfig())


def predictions(towers, per_cell):
    shapes = tuple(tuple(tower.shape[-2:]) for tower in towers)
    nothing = torch.zeros(0)
    return DensePredictions(tuple(towers), (), nothing, nothing, nothing, Anchors(nothing, shapes, per_cell))


def rois_of(ids, shapes, per_cell):
    """RoIs with the sources that rows (image, level, h, w, anchor) name."""
    starts = [sum(h * w for h, w in shapes[:level]) for level in range(len(shapes))]
    source = [
        -1 if level < 0 else (starts[level] + h * shapes[level][1] + w) * per_cell + a
        for _, level, h, w, a in ids.tolist()
    ]
    nothing = torch.zeros(0)
    return RoIs(nothing, ids[:, 0], torch.tensor(source), nothing, nothing)


@pytest.mark.parametrize("name", ["tfhead_t1000", "tfhead_t58640", "tfhead_t58641"])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_distillation_terms(reference, build, student_settings, name, dtype, rtol):
    numbers, settings = reference(name)
    numbers = {k: v.to(dtype) if v.is_floating_point() else v for k, v in numbers.items()}
    levels = sum(key.startswith("tower") for key in numbers)
    towers = [numbers[f"tower{k}"].requires_grad_() for k in range(levels)]
    maps = tuple(numbers[f"fcos{k}"].requires_grad_() for k in range(levels))
    rows = numbers["F2_A"].requires_grad_()
    seen = predictions(towers, 9)
    rois = rois_of(numbers["bbox_ids"].long(), seen.anchors.shapes, 9)
    student = build(student_settings)
    student.tower_channels, student.per_cell = towers[0].shape[1], 9
    rcnn = fixed(RoIAssistant, rows.shape[1], Assistance({}, ((rows,),), (rois,)))
    fcos = fixed(MapAssistant, maps[0].shape[1], Assistance({}, (maps,)))
    assistants = {
        "rcnn": Assisted(assistant=rcnn, ckd=settings["weight_rcnn"], ckd_adapter="per_anchor"),
        "fcos": Assisted(assistant=fcos, ckd=settings["weight_fcos"]),
    }
    method = TFHEAD(TFHEAD.Config(assistants=assistants, warmup=settings["warmup"]), student, None).to(dtype)
    conv, decouple = method.ckd_adapters["fcos"], method.ckd_adapters["rcnn"].linear
    conv.load_state_dict({"weight": numbers["conv_weight"], "bias": numbers["conv_bias"]})
    decouple.load_state_dict({"weight": numbers["decouple_weight"], "bias": numbers["decouple_bias"]})
    batch = DistillationBatch(None, None, student, None, seen, Clock(int(numbers["iteration"]), **PUBLISHED))
    losses = method(batch)
    close = {"rtol": rtol, "atol": rtol * 1e-2}
    torch.testing.assert_close(losses["fcos_ckd"], numbers["loss_fcos_sum"], **close)
    torch.testing.assert_close(losses["rcnn_ckd"], numbers["loss_rcnn"], **close)
    torch.stack(list(losses.values())).sum().backward()
    for part, layer in (("conv", conv), ("decouple", decouple)):
        torch.testing.assert_close(layer.weight.grad, numbers[f"grad_{part}_weight"], **close)
        torch.testing.assert_close(layer.bias.grad, numbers[f"grad_{part}_bias"], **close)
    for k, tower in enumerate(towers):
        torch.testing.assert_close(tower.grad, numbers[f"grad_tower{k}"], **close)
    assert rows.grad is None
    assert all(level.grad is None for level in maps)


def test_weight_of_the_rcnn_term(reference, build, student_settings):
    numbers, _ = reference("head_schedules")
    """A tower of zeros, a target of ones: the loss is the weight."""
    student = build(student_settings)
    student.tower_channels = student.per_cell = 1
    rois = rois_of(torch.zeros(1, 5, dtype=torch.int64), [(1, 1)], 1)
    choice = fixed(RoIAssistant, 1, Assistance({}, ((torch.ones(1, 1),),), (rois,)))
    method = TFHEAD(TFHEAD.Config(assistants={"a": Assisted(assistant=choice, ckd=1.3)}), student, None).double()
    torch.nn.init.zeros_(method.ckd_adapters["a"].linear.bias)
    found = []
    seen = predictions([torch.zeros(1, 1, 1, 1, dtype=torch.float64)], 1)
    for iteration in numbers["iterations"]:
        batch = DistillationBatch(None, None, student, None, seen, Clock(int(iteration), **PUBLISHED))
        found.append(method(batch)["a_ckd"].item())
    assert found == pytest.approx(numbers["tf_head_rcnn_weight"].tolist(), rel=1e-12)


def made(student, **settings):
    """TF-HEAD with the R-CNN assistant for a tiny student."""
    given = {"rois": 8, "proposals": 16, "warmup": 0, "assistants": {"rcnn": {"assistant": RCNN, "ckd": 1.3}}}
    choice = Choice.parse(DistillationMethod, {"name": "tf_head", **given, **settings})
    return choice.cls(choice.config, student, None)


@pytest.fixture
def alone(build, student_settings, seen):
    """A tiny student, the method, and one batch."""
    student = build(student_settings).train()
    return student, made(student), seen(student)


def learns(module):
    return any(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


def test_ckd_reaches_the_class_tower_and_never_an_assistant(alone):
    student, method, batch = alone
    method(batch)["rcnn_ckd"].backward()
    assert learns(student.head.classification_head.conv)
    assert learns(student.backbone)
    assert learns(method.ckd_adapters)
    assert all(p.grad is None for p in method.assistants.parameters())
    assert not learns(student.head.classification_head.cls_logits)
    assert not learns(student.head.regression_head)


def test_the_assistants_own_losses_reach_the_backbone_and_not_the_head(alone):
    student, method, batch = alone
    losses = method(batch)
    (losses["rcnn_cls"] + losses["rcnn_box"]).backward()
    assert learns(method.assistants)
    assert learns(student.backbone)
    assert not learns(student.head)


def test_everything_rises_from_zero_and_ckd_ends_at_the_first_drop(alone):
    student, method, batch = alone
    plain = method(batch)

    def shares(iteration, **settings):
        other = made(student, warmup=100, **settings)
        other.load_state_dict(method.state_dict())
        batch.clock = Clock(iteration, 1200, 100, (800, 1100))
        return {name: (loss / plain[name]).item() for name, loss in other(batch).items()}

    for iteration, both, ckd in ((0, 0, 0), (25, 0.25, 0.25), (800, 1, 1), (801, 1, 0)):
        found = shares(iteration)
        assert found["rcnn_cls"] == found["rcnn_box"] == pytest.approx(both)
        assert found["rcnn_ckd"] == pytest.approx(ckd)
    assert shares(600, until=0.5)["rcnn_ckd"] == pytest.approx(1)
    assert shares(601, until=0.5)["rcnn_ckd"] == 0


def test_without_assistants_it_is_plain_training(alone):
    student, _, batch = alone
    assert made(student, assistants={})(batch) == {}


def test_with_ckd_off_it_is_the_assistants_alone(alone):
    student, _, batch = alone
    method = made(student, assistants={"rcnn": {"assistant": RCNN, "ckd": 0}})
    assert {*method(batch)} == {"rcnn_cls", "rcnn_box"}
    assert not list(method.ckd_adapters.parameters())


def test_with_detached_features_and_ckd_off_the_backbone_learns_as_if_alone(alone):
    student, _, batch = alone
    method = made(student, assistants={"rcnn": {"assistant": RCNN, "ckd": 0}})
    features = batch.features
    batch.features = type(features)(
        features.backbone, tuple(level.detach() for level in features.levels), features.size
    )
    total = torch.stack([*method(batch).values(), *student.loss(batch.predictions, batch.targets).values()]).sum()
    total.backward()
    with_assistant = [p.grad.clone() for p in student.parameters()]
    student.zero_grad()
    predicted = student.predict(student.features(batch.images_BCHW), batch.targets)
    torch.stack(list(student.loss(predicted, batch.targets).values())).sum().backward()
    for mine, wanted in zip(with_assistant, (p.grad for p in student.parameters()), strict=True):
        torch.testing.assert_close(mine, wanted)


def test_a_constant_target_can_be_reached_by_the_adapters_bias(alone):
    """With the assistant at zero the tower need not move."""
    _, method, batch = alone
    for parameter in method.assistants.parameters():
        torch.nn.init.zeros_(parameter)
    adapter = method.ckd_adapters["rcnn"].linear
    torch.nn.init.zeros_(adapter.weight)
    torch.nn.init.zeros_(adapter.bias)
    assert method(batch)["rcnn_ckd"].item() == 0
    torch.nn.init.ones_(adapter.bias)
    torch.testing.assert_close(method(batch)["rcnn_ckd"], torch.tensor(1.3))


def test_golden_term(alone):
    """The published equation, written out: mean over kept rows and features."""
    _, method, batch = alone
    rois = method.config.choose(batch)
    hidden = method.assistants["rcnn"].head(batch.features.levels, rois).hidden[-1]
    linear = method.ckd_adapters["rcnn"].linear
    squares = []
    maps = batch.predictions.class_tower
    cells = [(level, i) for level, tower in enumerate(maps) for i in range(tower.shape[-2] * tower.shape[-1])]
    for row, (image, source) in enumerate(zip(rois.image_M.tolist(), rois.source_M.tolist(), strict=True)):
        if source >= 0:
            level, cell = cells[source // batch.predictions.anchors.per_cell]
            x = maps[level][image].flatten(1)[:, cell]
            squares.append((functional.linear(x, linear.weight, linear.bias) - hidden[row]).square())
    assert 0 < len(squares) < len(rois.source_M)
    torch.testing.assert_close(method(batch)["rcnn_ckd"], 1.3 * torch.stack(squares).mean())


def test_no_module_is_frozen(alone):
    _, method, _ = alone
    assert all(p.requires_grad for p in method.parameters())


def test_an_image_without_objects_gives_finite_losses(alone, build, student_settings):
    """One image, whose coarsest map is 1x1; wide enough that group normalisation has two values there."""
    _, _, batch = alone
    student = build({**student_settings, "neck_channels": 64}).train()
    points = {"assistant": {"name": "fcos", "head": {"convs": 1}}}
    method = made(student, assistants={"rcnn": {"assistant": RCNN}, "fcos": points})
    empty = Targets([torch.zeros(0, 4)], [torch.zeros(0, dtype=torch.int64)], [(64, 64)])
    task = DistillationTask(student, None, {"tf_head": method})
    losses = task(batch.images_BCHW[:1], empty, Clock(5, 100, 10, (50,)))
    torch.stack(list(losses.values())).sum().backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(p.grad is None or p.grad.isfinite().all() for p in task.parameters())


def test_a_two_stage_student_is_refused(build, teacher_settings):
    with pytest.raises(UserError, match="class tower of a dense student, and FasterRCNN has none"):
        made(build(teacher_settings))


def test_a_per_anchor_adapter_to_maps_is_refused(build, student_settings):
    choice = fixed(MapAssistant, 4, Assistance({}, ()))
    config = TFHEAD.Config(assistants={"a": Assisted(assistant=choice, ckd_adapter="per_anchor")})
    with pytest.raises(UserError, match="its maps have no anchors; set ckd_adapter: shared"):
        TFHEAD(config, build(student_settings), None)


def config_with(student, optimizer, **settings):
    methods = {"m": {"name": "tf_head", **settings}}
    return distill.Config(student=student, methods=methods, steps=10, optimizer=optimizer)


@pytest.mark.parametrize("optimizer", [{"schedule": "cosine"}, {"schedule": "constant"}, {"milestones": []}])
def test_a_schedule_without_milestones_is_refused_before_any_training(student_settings, optimizer):
    (problem,) = distill.check(config_with(student_settings, optimizer), {})
    assert problem.startswith("methods.m: its CKD stops at the first drop of the learning rate, and the schedule ")
    assert list(distill.check(config_with(student_settings, optimizer, until=0.6), {})) == []
    off = {"a": {"assistant": "rcnn", "ckd": 0}}
    assert list(distill.check(config_with(student_settings, optimizer, assistants=off), {})) == []


def test_a_two_stage_student_is_refused_before_any_training(teacher_settings):
    (problem,) = distill.check(config_with(teacher_settings, {}), {})
    assert problem.startswith("methods.m: it teaches the class tower of a dense student, and FasterRCNN has none")


def test_no_teacher_is_needed_and_one_of_other_methods_is_no_matter(student_settings, teacher_settings):
    class Node:
        name = "teacher"
        config = train.Config(detector=teacher_settings, steps=1)

    assert list(distill.check(config_with(student_settings, {}), {})) == []
    assert list(distill.check(config_with(student_settings, {}), {"teacher": [Node]})) == []


def test_published_settings_are_the_defaults():
    rcnn, fcos = TFHEAD.Config().assistants.values()
    assert (rcnn.assistant.name, rcnn.ckd, rcnn.ckd_adapter) == ("rcnn", 1.3, "per_anchor")
    assert (fcos.assistant.name, fcos.ckd, fcos.ckd_adapter) == ("fcos", 1.0, "shared")
    assert fcos.assistant.config.weight == 0.5
