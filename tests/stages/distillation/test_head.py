"""HEAD against its authors' numbers: adapters, gathering, proposals, sampling, RoI levels, schedules, the whole."""

import math

import pytest
import torch
from torch.nn import functional
from torchvision.models.detection._utils import BoxCoder

from stages.detection.detector import Anchors, Proposals, ProposalSettings, Targets
from stages.detection.proposals import SamplingSettings, class_agnostic_proposals, sample_rois
from stages.detection.roi_head import roi_level
from stages.distillation.adapter import PerAnchorLinear
from stages.distillation.methods.head import gather_cells, imitation
from stages.training.clock import Clock, warmed

EXACT = {"rtol": 1e-9, "atol": 1e-12}


def clock(iteration):
    return Clock(int(iteration), 10**6, 1)


def flat_index(level, row, column, anchor, shapes, per_cell):
    start = sum(h * w for h, w in shapes[:level])
    return (start + row * shapes[level][1] + column) * per_cell + anchor


def loaded(weight, bias):
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0]).double()
    layer.load_state_dict({"weight": weight.double(), "bias": bias.double()})
    return layer


@pytest.mark.parametrize("name", ["head_akd_small", "head_akd_1024"])
def test_akd_term(reference, name):
    numbers, settings = reference(name)
    weight = numbers["weight"] if "weight" in numbers else numbers["weight_int8"].double() / 2048
    adapter = loaded(weight, numbers["bias"])
    mine = numbers["F_A"].double().requires_grad_()
    for iteration, wanted in zip(numbers["iterations"], numbers["loss"], strict=True):
        loss = warmed(2.0, clock(iteration), 2000) * imitation(adapter(mine), numbers["F_T"].double())
        torch.testing.assert_close(loss, wanted, **EXACT)
    loss = warmed(2.0, clock(settings["gradients_at_iteration"]), 2000) * imitation(
        adapter(mine), numbers["F_T"].double()
    )
    loss.backward()
    torch.testing.assert_close(mine.grad, numbers["grad_F_A"], rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(adapter.bias.grad, numbers["grad_bias"], rtol=1e-9, atol=1e-14)
    rows = numbers.get("grad_weight", numbers.get("grad_weight_rows0_3"))
    torch.testing.assert_close(adapter.weight.grad[: len(rows)], rows, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("name", ["head_decouple1", "head_decouple9"])
def test_per_anchor_adapter(reference, name):
    numbers, settings = reference(name)
    layer = PerAnchorLinear(settings["in_features"], settings["out_features"], settings["num"]).double()
    layer.linear.load_state_dict({"weight": numbers["weight"], "bias": numbers["bias"]})
    x = numbers["x"].requires_grad_()
    out = layer(x, numbers["anchor_id"].long())
    torch.testing.assert_close(out, numbers["out"], **EXACT)
    loss = settings["loss_weight"] * imitation(out, numbers["target"])
    loss.backward()
    torch.testing.assert_close(loss, numbers["loss"], **EXACT)
    torch.testing.assert_close(x.grad, numbers["grad_x"], **EXACT)
    torch.testing.assert_close(layer.linear.weight.grad, numbers["grad_weight"], **EXACT)


@pytest.mark.parametrize("name", ["head_full_t0", "head_full_t500", "head_full_t5000", "head_full_only_gt"])
def test_whole_distiller(reference, name):
    numbers, settings = reference(name)
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
        torch.testing.assert_close(mine, numbers[f"F{k}_A"], **EXACT)
        torch.testing.assert_close(theirs, numbers[f"F{k}_T"], **EXACT)
    weight = warmed(2.0, clock(numbers["iteration"]), 2000)
    adapters = {n: loaded(numbers[f"{n}_weight"], numbers[f"{n}_bias"]) for n in ("A1", "A2", "Ac")}
    akd = [weight * imitation(adapters[f"A{k + 1}"](hidden["assistant"][k]), hidden["teacher"][k]) for k in (0, 1)]
    torch.testing.assert_close(akd[0], numbers["loss_akd1"], **EXACT)
    torch.testing.assert_close(akd[1], numbers["loss_akd2"], **EXACT)

    towers = tuple(numbers[f"tower{k}"].requires_grad_() for k in range(len(shapes)))
    ids = numbers["bbox_ids"].long()
    kept = ids[:, 1] >= 0
    source = torch.tensor([flat_index(*row[1:].tolist(), shapes, 9) for row in ids[kept]], dtype=torch.int64)
    rows = gather_cells(towers, ids[kept][:, 0], source, 9)
    torch.testing.assert_close(rows, numbers["gathered"], **EXACT)
    if "anchor_ids" in numbers and len(rows):
        assert (source % 9).tolist() == numbers["anchor_ids"].long().tolist()
    ckd = weight * imitation(adapters["Ac"](rows), hidden["teacher"][1][kept])
    (sum(akd) + ckd).backward()
    if name == "head_full_only_gt":
        assert numbers["loss_ckd"].isnan()  # the mean over nothing; ours is 0 and the gradients are the same
        assert ckd.item() == 0
    else:
        torch.testing.assert_close(ckd, numbers["loss_ckd"], **EXACT)
    torch.testing.assert_close(numbers["roi_feats_assistant"].grad, numbers["grad_roi_feats_assistant"], **EXACT)
    for adapter, layer in adapters.items():
        torch.testing.assert_close(layer.weight.grad, numbers[f"grad_{adapter}_weight"], **EXACT)
        torch.testing.assert_close(layer.bias.grad, numbers[f"grad_{adapter}_bias"], **EXACT)
    for k, tower in enumerate(towers):
        found = torch.zeros_like(tower) if tower.grad is None else tower.grad
        torch.testing.assert_close(found, numbers[f"grad_tower{k}"], **EXACT)


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


def test_warm_up_is_zero_at_first():
    assert [warmed(2.0, clock(i), 2000) for i in (0, 1000, 2000, 10**6)] == [0.0, 1.0, 2.0, 2.0]


def test_golden_imitation():
    x, target = torch.arange(6.0).view(2, 3), torch.ones(2, 3)
    assert imitation(x, target).item() == pytest.approx((1 + 0 + 1 + 4 + 9 + 16) / 6)
    assert imitation(x, 2 * target, normalise=True).item() == pytest.approx((4 + 1 + 0 + 1 + 4 + 9) / 6 / 4)
    assert math.isfinite(imitation(torch.zeros(0, 3), torch.zeros(0, 3)).item())


@pytest.fixture
def trained(build, student_settings, teacher_settings):
    """HEAD on a tiny pair, with the records of one batch."""
    from pipeline.config import Choice
    from stages.distillation.method import DistillationBatch, DistillationMethod

    student, teacher = build(student_settings).train(), build(teacher_settings).eval().requires_grad_(False)
    settings = {"name": "head", "rois": 8, "proposals": 16, "warmup": 0}
    choice = Choice.parse(DistillationMethod, settings)
    method = choice.cls(choice.config, student, teacher)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    targets = Targets([torch.tensor([[8.0, 8, 40, 40]])] * 2, [torch.tensor([1])] * 2, [(64, 64)] * 2)
    features = student.features(images)
    for level in features.levels:
        level.retain_grad()
    predictions = student.predict(features, targets)
    batch = DistillationBatch(images, targets, student, features, predictions, clock(5), teacher)
    return student, teacher, method, batch


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
    rois = batch.rois(method.proposal_settings, method.sampling)
    mine = assistant(batch.teacher_features.levels, rois).hidden
    theirs = teacher.roi_head(batch.teacher_features, rois).hidden
    assert all(imitation(a, b).item() == 0 for a, b in zip(mine, theirs, strict=True))


def test_hidden_layers_and_towers_are_after_their_relu(trained):
    _, teacher, method, batch = trained
    rois = batch.rois(method.proposal_settings, method.sampling)
    for layer in (
        *method.assistant(batch.features, rois).hidden,
        *teacher.roi_head(batch.teacher_features, rois).hidden,
    ):
        assert layer.min() >= 0
    assert all(tower.min() >= 0 for tower in batch.predictions.class_tower)


def test_the_student_is_the_same_with_and_without_the_method(trained):
    student, _, method, batch = trained
    student.eval()
    with torch.no_grad():
        before = student(batch.images_BCHW, 20)
        method(batch)
        after = student(batch.images_BCHW, 20)
    assert torch.equal(before.scores_BN, after.scores_BN)
    assert torch.equal(before.boxes_BN4, after.boxes_BN4)


def test_rois_are_made_once_and_shared(trained):
    *_, method, batch = trained
    first = batch.rois(method.proposal_settings, method.sampling)
    assert batch.rois(method.proposal_settings, method.sampling) is first
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
