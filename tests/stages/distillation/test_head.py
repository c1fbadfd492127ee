"""HEAD against its authors' numbers: adapters, gathering, proposals, sampling, RoI levels, schedules, the whole."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional
from torchvision.models.detection._utils import BoxCoder

from pipeline.config import Choice
from pipeline.errors import UserError
from stages.detection.load import checksum
from stages.detection.proposals import SamplingSettings, class_agnostic_proposals, sample_rois
from stages.detection.records import Anchors, Proposals, ProposalSettings, Targets
from stages.detection.roi_head import roi_level
from stages.distillation.adapter import PerAnchorLinear
from stages.distillation.imitation import gather_cells, imitation, layer_imitation
from stages.distillation.method import DistillationMethod
from stages.training.clock import Clock, stopped, warmed

EXACT = {"rtol": 1e-9, "atol": 1e-12}
SINGLE = {"rtol": 1e-5, "atol": 1e-6}
PRECISIONS = pytest.mark.parametrize(("dtype", "close"), [(torch.float64, EXACT), (torch.float32, SINGLE)])


def cast(numbers, dtype):
    """The vectors in the precision in which they are to be reproduced."""
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in numbers.items()}


def clock(iteration):
    return Clock(int(iteration), 10**6, 1)


def flat_index(level, row, column, anchor, shapes, per_cell):
    start = sum(h * w for h, w in shapes[:level])
    return (start + row * shapes[level][1] + column) * per_cell + anchor


def loaded(weight, bias):
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
    layer.load_state_dict({"weight": weight, "bias": bias})
    return layer


@PRECISIONS
@pytest.mark.parametrize("name", ["head_akd_small", "head_akd_1024"])
def test_akd_term(reference, name, dtype, close):
    numbers, settings = reference(name)
    numbers = cast(numbers, dtype)
    weight = numbers["weight"] if "weight" in numbers else numbers["weight_int8"].to(dtype) / 2048
    adapter = loaded(weight, numbers["bias"])
    mine = numbers["F_A"].requires_grad_()
    for iteration, wanted in zip(numbers["iterations"], numbers["loss"], strict=True):
        loss = warmed(2.0, clock(iteration), 2000) * imitation(adapter(mine), numbers["F_T"])
        torch.testing.assert_close(loss, wanted, **close)
    loss = warmed(2.0, clock(settings["gradients_at_iteration"]), 2000) * imitation(adapter(mine), numbers["F_T"])
    loss.backward()
    close = {**close, "atol": close["atol"] * 1e-2}  # gradients are of the size of 1e-4
    torch.testing.assert_close(mine.grad, numbers["grad_F_A"], **close)
    torch.testing.assert_close(adapter.bias.grad, numbers["grad_bias"], **close)
    rows = numbers.get("grad_weight", numbers.get("grad_weight_rows0_3"))
    torch.testing.assert_close(adapter.weight.grad[: len(rows)], rows, **close)


@PRECISIONS
@pytest.mark.parametrize("name", ["head_decouple1", "head_decouple9"])
def test_per_anchor_adapter(reference, name, dtype, close):
    numbers, settings = reference(name)
    numbers = cast(numbers, dtype)
    layer = PerAnchorLinear(settings["in_features"], settings["out_features"], settings["num"]).to(dtype)
    layer.linear.load_state_dict({"weight": numbers["weight"], "bias": numbers["bias"]})
    x = numbers["x"].requires_grad_()
    out = layer(x, numbers["anchor_id"].long())
    torch.testing.assert_close(out, numbers["out"], **close)
    loss = settings["loss_weight"] * imitation(out, numbers["target"])
    loss.backward()
    torch.testing.assert_close(loss, numbers["loss"], **close)
    torch.testing.assert_close(x.grad, numbers["grad_x"], **close)
    torch.testing.assert_close(layer.linear.weight.grad, numbers["grad_weight"], **close)
    torch.testing.assert_close(layer.linear.bias.grad, numbers["grad_bias"], **close)


@PRECISIONS
@pytest.mark.parametrize("name", ["head_full_t0", "head_full_t500", "head_full_t5000", "head_full_only_gt"])
def test_whole_distiller(reference, name, dtype, close):
    numbers, settings = reference(name)
    numbers = cast(numbers, dtype)
    shapes = [tuple(shape) for shape in settings["levels"]]
    hidden = {}
    for who, feats in (("assistant", "roi_feats_assistant"), ("teacher", "roi_feats_teacher")):
        x = numbers[feats].requires_grad_(who == "assistant")
        layers = [
            loaded(numbers[f"{who}_shared_fcs.{k}.weight"], numbers[f"{who}_shared_fcs.{k}.bias"]) for k in (0, 1)
        ]
        first = functional.relu(layers[0](x.flatten(1)))
        hidden[who] = (first, functional.relu(layers[1](first)))
    for k, (mine, theirs) in enumerate(zip(hidden["assistant"], hidden["teacher"], strict=True), 1):
        torch.testing.assert_close(mine, numbers[f"F{k}_A"], **close)
        torch.testing.assert_close(theirs, numbers[f"F{k}_T"], **close)
    weight = warmed(2.0, clock(numbers["iteration"]), 2000)
    adapters = {n: loaded(numbers[f"{n}_weight"], numbers[f"{n}_bias"]) for n in ("A1", "A2", "Ac")}
    akd = [weight * imitation(adapters[f"A{k + 1}"](hidden["assistant"][k]), hidden["teacher"][k]) for k in (0, 1)]
    torch.testing.assert_close(akd[0], numbers["loss_akd1"], **close)
    torch.testing.assert_close(akd[1], numbers["loss_akd2"], **close)

    towers = tuple(numbers[f"tower{k}"].requires_grad_() for k in range(len(shapes)))
    ids = numbers["bbox_ids"].long()
    kept = ids[:, 1] >= 0
    source = torch.tensor([flat_index(*row[1:].tolist(), shapes, 9) for row in ids[kept]], dtype=torch.int64)
    rows = gather_cells(towers, ids[kept][:, 0], source, 9)
    torch.testing.assert_close(rows, numbers["gathered"], **close)
    if "anchor_ids" in numbers and len(rows):
        assert (source % 9).tolist() == numbers["anchor_ids"].long().tolist()
    ckd = weight * imitation(adapters["Ac"](rows), hidden["teacher"][1][kept])
    (sum(akd) + ckd).backward()
    if name == "head_full_only_gt":
        assert numbers["loss_ckd"].isnan()  # the mean over nothing; ours is 0 and the gradients are the same
        assert ckd.item() == 0
    else:
        torch.testing.assert_close(ckd, numbers["loss_ckd"], **close)
    torch.testing.assert_close(numbers["roi_feats_assistant"].grad, numbers["grad_roi_feats_assistant"], **close)
    for adapter, layer in adapters.items():
        torch.testing.assert_close(layer.weight.grad, numbers[f"grad_{adapter}_weight"], **close)
        torch.testing.assert_close(layer.bias.grad, numbers[f"grad_{adapter}_bias"], **close)
    for k, tower in enumerate(towers):
        found = torch.zeros_like(tower) if tower.grad is None else tower.grad
        torch.testing.assert_close(found, numbers[f"grad_tower{k}"], **close)


def mmdet_anchors(shapes, strides):
    """Three octaves and three ratios a cell, not rounded: what HEAD's proposals were computed with."""
    result = []
    for (rows, columns), stride in zip(shapes, strides, strict=True):
        sizes = 4 * stride * 2.0 ** (torch.arange(3).double() / 3)
        root = torch.tensor([0.5, 1.0, 2.0]).double().sqrt()
        w, h = (sizes[None] / root[:, None]).flatten(), (sizes[None] * root[:, None]).flatten()
        base = torch.stack([-w / 2, -h / 2, w / 2, h / 2], 1)
        y, x = torch.meshgrid(torch.arange(rows) * stride, torch.arange(columns) * stride, indexing="ij")
        shift = torch.stack([x, y, x, y], -1).view(-1, 1, 4)
        result.append((shift + base).reshape(-1, 4))
    return Anchors(torch.cat(result), tuple(shapes), 9)


def test_anchor_order(reference):
    numbers, settings = reference("head_anchor_ids")
    anchors = mmdet_anchors([tuple(s) for s in settings["sizes"]], settings["strides"])
    wanted = torch.cat([numbers[f"anchors{k}"] for k in range(3)])
    torch.testing.assert_close(anchors.boxes_A4, wanted, rtol=1e-9, atol=1e-9)
    ids = torch.cat([numbers[f"ids{k}"] for k in range(3)])
    found = [flat_index(*row.tolist(), anchors.shapes, 9) for row in ids]
    assert found == list(range(len(ids)))


@pytest.mark.parametrize("name", ["head_proposals", "head_proposals_all"])
def test_proposals(reference, name):
    numbers, settings = reference(name)
    count, classes = len(settings["strides"]), settings["num_classes"]
    shapes = [tuple(numbers[f"cls_score{k}"].shape[-2:]) for k in range(count)]
    anchors = mmdet_anchors(shapes, settings["strides"])

    def flat(key, each):
        maps = [numbers[f"{key}{k}"] for k in range(count)]
        return torch.cat([m.permute(0, 2, 3, 1).reshape(len(m), -1, each) for m in maps], 1)

    scores = flat("cls_score", classes).max(-1).values.sigmoid()
    deltas = flat("bbox_pred", 4)
    boxes = BoxCoder((1.0, 1.0, 1.0, 1.0)).decode_single(deltas.flatten(0, 1), anchors.boxes_A4.repeat(len(deltas), 1))
    sizes = [tuple(size) for size in numbers["img_shapes"].tolist()]
    limits = ProposalSettings(settings["nms_pre"], settings["nms_iou"], settings["max_per_img"])
    found = class_agnostic_proposals(scores, boxes.view_as(deltas), anchors, sizes, limits)
    for image, proposals in enumerate(found):
        wanted = numbers[f"proposals{image}"]
        torch.testing.assert_close(proposals.boxes, wanted[:, :4], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(proposals.scores, wanted[:, 4], rtol=1e-9, atol=1e-9)
        ids = [flat_index(*row.tolist(), shapes, 9) for row in numbers[f"ids{image}"]]
        assert proposals.source.tolist() == ids
        assert not proposals.boxes.requires_grad


def test_sampling(reference):
    numbers, settings = reference("head_sampling")
    proposals, truth = [], []
    for image in (0, 1):
        given = numbers[f"proposals{image}"]
        proposals.append(Proposals(given[:, :4], given[:, 4], torch.arange(len(given))))
        truth.append(numbers[f"gt_bboxes{image}"])
    targets = Targets(truth, [torch.arange(len(t)) for t in truth], [(100, 100)] * 2)
    # The 25 % cap of the sampler is not in the vector: its 512 leave room for all.
    rois = sample_rois(
        proposals, targets, SamplingSettings(settings["num"], settings["pos_fraction"], settings["pos_iou"])
    )
    for image in (0, 1):
        mine = rois.image_M == image
        # The original lists positives before negatives; as a set (with who is positive) the rows are the same.
        found = sorted(
            [*box, float(positive)]
            for box, positive in zip(rois.boxes_M4[mine].tolist(), (rois.labels_M[mine] >= 0).tolist(), strict=True)
        )
        positives = len(numbers[f"pos_inds{image}"])
        wanted = sorted([*box, float(k < positives)] for k, box in enumerate(numbers[f"rois{image}"].tolist()))
        assert found == wanted
        ground_truth = rois.source_M[mine] < 0
        assert ground_truth.sum() == len(truth[image])
        assigned = numbers[f"pos_assigned_gt_inds{image}"]
        assert sorted(rois.labels_M[mine][rois.labels_M[mine] >= 0].tolist()) == sorted(assigned.tolist())


def test_at_most_a_quarter_is_positive():
    box = torch.tensor([[10.0, 10, 50, 50]])
    many = Proposals(box.repeat(40, 1), torch.ones(40), torch.arange(40))
    none = Proposals(torch.rand(40, 4).cumsum(1), torch.ones(40), torch.arange(40))
    both = Proposals(torch.cat([many.boxes, none.boxes]), torch.ones(80), torch.arange(80))
    rois = sample_rois([both], Targets([box], [torch.tensor([4])], [(100, 100)]), SamplingSettings(16))
    assert len(rois.labels_M) == 16
    assert (rois.labels_M == 4).sum() == 4


def test_roi_levels(reference):
    numbers, settings = reference("head_roi_levels")
    levels = roi_level(numbers["boxes"], settings["finest_scale"], settings["num_levels"])
    assert levels.tolist() == numbers["level"].tolist()
    assert [settings["assistant_strides"][k] for k in levels] == numbers["assistant_stride"].tolist()


def test_warm_up(reference):
    numbers, _ = reference("head_schedules")
    found = [warmed(2.0, clock(i), 2000) for i in numbers["iterations"]]
    assert found == pytest.approx(numbers["warmup2"].tolist(), rel=1e-12)


def test_early_stops(reference):
    """Still on at the iteration itself: 8 and 11 epochs of 7330 iterations."""
    numbers, _ = reference("head_schedules")
    for epochs in (8, 11):
        found = [stopped(1.0, clock(i), 7330 * epochs) for i in numbers["iterations"]]
        assert found == numbers[f"early_stop_{epochs}"].tolist()


def test_warm_up_is_zero_at_first():
    assert [warmed(2.0, clock(i), 2000) for i in (0, 1000, 2000, 10**6)] == [0.0, 1.0, 2.0, 2.0]


def test_golden_imitation():
    x, target = torch.arange(6.0).view(2, 3), torch.ones(2, 3)
    assert imitation(x, target).item() == pytest.approx((1 + 0 + 1 + 4 + 9 + 16) / 6)
    assert imitation(x, 2 * target, normalise=True).item() == pytest.approx((4 + 1 + 0 + 1 + 4 + 9) / 6 / 4)
    assert math.isfinite(imitation(torch.zeros(0, 3), torch.zeros(0, 3)).item())


def made(student, teacher, **settings):
    """HEAD for a tiny pair."""
    choice = Choice.parse(DistillationMethod, {"name": "head", "rois": 8, "proposals": 16, "warmup": 0, **settings})
    return choice.cls(choice.config, student, teacher)


@pytest.fixture
def trained(build, student_settings, teacher_settings, seen):
    """HEAD on a tiny pair, with the records of one batch."""
    student, teacher = build(student_settings).train(), build(teacher_settings).eval().requires_grad_(False)
    return student, teacher, made(student, teacher), seen(student, teacher)


def learns(module):
    return any(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


def test_akd_reaches_assistant_and_neck_but_not_the_dense_head(trained):
    student, _, method, batch = trained
    method(batch)["akd"].backward()
    assert learns(method.assistant)
    assert learns(student.backbone)
    assert not learns(student.head)
    assert batch.features.levels[0].grad.abs().sum() > 0


def test_ckd_reaches_the_class_tower_but_neither_assistant_nor_outputs_nor_box_branch(trained):
    student, _, method, batch = trained
    method(batch)["ckd"].backward()
    assert learns(student.head.classification_head.conv)
    assert learns(student.backbone)
    assert not learns(student.head.classification_head.cls_logits)
    assert not learns(student.head.regression_head)
    assert not learns(method.assistant)


def test_assistant_begins_with_the_teachers_weights(trained):
    _, teacher, method, _ = trained
    mine, theirs = method.assistant.head.state_dict(), teacher.roi_heads.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_on_the_teachers_own_features_with_identity_adapters_akd_is_zero(trained):
    _, teacher, method, batch = trained
    from stages.detection.roi_head import RoIHead

    assistant = RoIHead(teacher.roi_heads.config, teacher.roi_heads.channels, teacher.strides, teacher.classes)
    assistant.load_state_dict(teacher.roi_heads.state_dict())
    rois = method.config.choose(batch)
    mine = assistant(batch.teacher_features.levels, rois).hidden
    theirs = teacher.roi_head(batch.teacher_features, rois).hidden
    assert all(imitation(a, b).item() == 0 for a, b in zip(mine, theirs, strict=True))


def test_hidden_layers_and_towers_are_after_their_relu(trained):
    _, teacher, method, batch = trained
    assistance = method.assistant(batch, method.config)
    for (layer,) in (*assistance.hidden, *method.assistant.ask(teacher, batch.teacher_features, assistance)):
        assert layer.min() >= 0
    assert all(tower.min() >= 0 for tower in batch.predictions.class_tower)


def test_rois_are_made_once_and_shared(trained):
    *_, method, batch = trained
    first = method.config.choose(batch)
    assert method.config.choose(batch) is first
    assert not first.boxes_M4.requires_grad


def test_gathering_finds_the_cell_each_roi_came_from():
    """Every cell of every level holds its own code."""
    shapes, per_cell = [(3, 4), (2, 2)], 3
    towers, code = [], 0
    for rows, columns in shapes:
        cells = torch.arange(code, code + 2 * rows * columns, dtype=torch.float32).view(2, 1, rows, columns)
        towers.append(cells)
        code += 2 * rows * columns
    for level, (rows, columns) in enumerate(shapes):
        for image in (0, 1):
            for row in range(rows):
                for column in range(columns):
                    for anchor in range(per_cell):
                        source = torch.tensor([flat_index(level, row, column, anchor, shapes, per_cell)])
                        found = gather_cells(tuple(towers), torch.tensor([image]), source, per_cell)
                        assert found.item() == towers[level][image, 0, row, column]


def test_nine_equal_blocks_are_one_shared_adapter():
    shared = torch.nn.Linear(5, 7)
    layer = PerAnchorLinear(5, 7, 9)
    layer.linear.load_state_dict({"weight": shared.weight.repeat(9, 1), "bias": shared.bias.repeat(9)})
    x = torch.randn(12, 5)
    torch.testing.assert_close(layer(x, torch.arange(12) % 9), shared(x))


def test_the_loss_of_a_layer_is_summed_over_its_levels():
    maps = (torch.ones(1, 2, 2, 2), torch.zeros(1, 2, 1, 1))
    wanted = (torch.zeros(1, 2, 2, 2), torch.full((1, 2, 1, 1), 3.0))
    assert layer_imitation(maps, wanted).item() == 1 + 9


def test_switches_leave_what_they_name(trained):
    student, teacher, _, batch = trained
    assert {*made(student, teacher, akd=0, ckd=0)(batch)} == {"assist_cls", "assist_box"}
    assert {*made(student, teacher, ckd=0)(batch)} == {"assist_cls", "assist_box", "akd"}
    kept = {key.split(".")[0] for key in made(student, teacher, akd=0, ckd=0).state_dict()}
    assert kept == {"assistant"}


def test_weights_follow_the_clock(trained):
    """Warm-up of everything, of CKD alone and of the assistant's own losses; the end of CKD."""
    student, teacher, method, batch = trained
    plain = method(batch)

    def share(iteration, term, **settings):
        other = made(student, teacher, **settings)
        other.load_state_dict(method.state_dict())
        batch.clock = Clock(iteration, 1200, 100)
        return (other(batch)[term] / plain[term]).item()

    assert share(0, "akd", warmup=100) == 0
    assert share(25, "akd", warmup=100) == pytest.approx(0.25)
    assert share(25, "ckd", warmup=100) == pytest.approx(0.25)
    assert share(25, "ckd", warmup=100, ckd_warmup=0) == pytest.approx(1)
    assert share(25, "assist_cls", warmup=100) == pytest.approx(1)
    assert share(25, "assist_cls", assistant_warmup=100) == pytest.approx(0.25)
    assert share(1100, "ckd", ckd_until=11 / 12) == pytest.approx(1)
    assert share(1101, "ckd", ckd_until=11 / 12) == 0
    assert share(1101, "akd", ckd_until=11 / 12) == pytest.approx(1)


def test_a_per_anchor_adapter_reads_the_anchor_of_each_roi(trained, build, student_settings):
    _, teacher, _, _ = trained
    student = build({**student_settings, "aspect_ratios": [0.5, 1.0]})
    method = made(student, teacher, ckd_adapter="per_anchor")
    assert method.ckd_adapter.linear.out_features == student.per_cell * teacher.roi_heads.config.hidden


def test_the_order_and_number_of_rois_do_not_matter(trained):
    """Permuted or all twice: each term is a mean over them."""
    *_, method, batch = trained
    rois = method.config.choose(batch)
    before = method(batch)
    order = torch.randperm(len(rois.labels_M), generator=torch.Generator().manual_seed(0))
    for rows in (order, torch.cat([order, order])):
        changed = replace(rois, **{name: value[rows] for name, value in vars(rois).items()})
        (key,) = batch._rois
        batch._rois[key] = changed
        for name, loss in method(batch).items():
            torch.testing.assert_close(loss, before[name], rtol=1e-5, atol=1e-6)


def test_the_target_of_ckd_does_not_depend_on_the_student(trained):
    student, teacher, method, batch = trained
    assistance = method.assistant(batch, method.config)
    before = method.assistant.ask(teacher, batch.teacher_features, assistance)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.1)
    after = method.assistant.ask(teacher, batch.teacher_features, assistance)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(before, after, strict=True))


def test_the_assistant_leaves_the_teachers_weights_after_a_step_and_the_teacher_stays(trained):
    _, teacher, method, batch = trained
    before = checksum(teacher)
    torch.stack(list(method(batch).values())).sum().backward()
    torch.optim.SGD(method.parameters(), lr=0.1).step()
    mine, theirs = method.assistant.head.state_dict(), teacher.roi_heads.state_dict()
    assert not any(torch.equal(mine[key], theirs[key]) for key in mine)
    assert checksum(teacher) == before
    assert all(p.grad is None for p in teacher.parameters())


def test_without_transfer_the_assistant_is_random(trained):
    student, teacher, _, _ = trained
    head = made(student, teacher, assistant={"name": "rcnn", "transfer": False}).assistant.head
    assert not torch.equal(head.box_head.fc6.weight, teacher.roi_heads.box_head.fc6.weight)


def test_l1_is_the_mean_absolute_error_on_boxes(trained):
    student, teacher, _, batch = trained
    method = made(student, teacher, akd=0, ckd=0, assistant={"name": "rcnn", "box_loss": "l1"})
    rois = method.config.choose(batch)
    found = method(batch)["assist_box"]
    activations = method.assistant.head(batch.features.levels, rois)
    positive = rois.labels_M >= 0
    given = activations.deltas[positive, rois.labels_M[positive] + 1]
    wanted = BoxCoder((10.0, 10.0, 5.0, 5.0)).encode_single(rois.matched_M4[positive], rois.boxes_M4[positive])
    torch.testing.assert_close(found, (given - wanted).abs().sum() / len(rois.labels_M))


def test_a_student_without_a_class_tower_needs_ckd_off(trained, build, teacher_settings):
    class OtherKind(type(build(teacher_settings))):
        """As good as a cascade: a two-stage teacher of another kind."""

    _, teacher, _, _ = trained
    other = OtherKind.build(teacher.config, 10)
    with pytest.raises(UserError, match="FasterRCNN has none; set ckd: 0"):
        made(teacher, other)


def test_a_shape_beside_a_teacher_is_refused(trained):
    student, teacher, _, _ = trained
    with pytest.raises(UserError, match="leave `head` out"):
        made(student, teacher, assistant={"name": "rcnn", "head": {"hidden": 8}})


def test_gradients_in_float64():
    """Gathering, adapter and imitation together, by finite differences."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    layer = PerAnchorLinear(3, 4, 2).double()
    towers = (random(2, 3, 2, 2).requires_grad_(), random(2, 3, 1, 1).requires_grad_())
    image, source, target = torch.tensor([0, 1, 1]), torch.tensor([3, 8, 9]), random(3, 4)

    def loss(first, second, weight):
        rows = gather_cells((first, second), image, source, 2)
        adapted = torch.func.functional_call(layer, {"linear.weight": weight}, (rows, source % 2))
        return imitation(adapted, target) + imitation(adapted, target, normalise=True)

    assert torch.autograd.gradcheck(loss, (*towers, layer.linear.weight.detach().requires_grad_()))
