"""GFL: its losses and its assignment against the authors' numbers, its distributions by hand, its neck."""

import numpy as np
import pytest
import torch

from stages.detection.assignment import Assignment, atss, squares
from stages.detection.generalised_focal import bins_of, distribution_focal, expected
from stages.detection.pan import PathAggregation
from stages.detection.points import CODER
from stages.detection.records import Anchors, DensePredictions, Targets


def test_assignment_equals_the_authors_code(reference):
    numbers, settings = reference("ld_vlr_region")
    levels = numbers["num_level_anchors"].tolist()
    found = atss(numbers["gt_bboxes"], numbers["anchors"], levels, settings["topk"])
    assert torch.equal(found.match_A + 1, numbers["assigned_gt_inds"])
    torch.testing.assert_close(found.threshold_N, numbers["atss_threshold"])


def atss_by_hand(truth, boxes, levels, nearest):
    """Object after object as arXiv 1912.02424, algorithm 1, says it."""
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    chosen = [(0.0, -1)] * len(boxes)
    for index, box in enumerate(truth):
        candidates, begin = [], 0
        for count in levels:
            far = np.linalg.norm(centre[begin : begin + count] - (box[:2] + box[2:]) / 2, axis=1)
            candidates += list(begin + np.argsort(far, kind="stable")[:nearest])
            begin += count
        low, high = np.maximum(boxes[:, :2], box[:2]), np.minimum(boxes[:, 2:], box[2:])
        overlap = np.prod(np.maximum(high - low, 0), 1)
        iou = overlap / (np.prod(boxes[:, 2:] - boxes[:, :2], 1) + np.prod(box[2:] - box[:2]) - overlap)
        least = iou[candidates].mean() + iou[candidates].std(ddof=1)
        for point in candidates:
            inside = (centre[point] > box[:2]).all() and (centre[point] < box[2:]).all()
            if iou[point] >= least and inside and iou[point] > chosen[point][0]:
                chosen[point] = (iou[point], index)
    return [index for _, index in chosen]


def test_assignment_by_hand(build, distributions_settings):
    gfl = build(distributions_settings)
    rng = np.random.default_rng(0)
    corner, side = rng.uniform(0, 80, (6, 2)), rng.uniform(12, 60, (6, 2))
    truth = np.concatenate([corner, corner + side], 1)
    levels = tuple(torch.zeros(1, 1, 128 // stride, 192 // stride) for stride in gfl.strides)
    anchors = gfl.anchors(levels, (128, 192))
    around = squares(anchors, gfl.config.anchor_scale)
    assert (around[:, 2] - around[:, 0]).unique().tolist() == [32, 64, 128, 256]
    found = gfl.assign(torch.from_numpy(truth).float(), anchors).match_A
    assert found.tolist() == atss_by_hand(truth, around.double().numpy(), anchors.per_level, 9)
    assert len(found.unique()) > 4
    assert (gfl.assign(torch.zeros(0, 4), anchors).match_A == -1).all()


def test_losses_equal_the_authors_code(reference, assert_near, build, distributions_settings, monkeypatch):
    """One level: their points, the labels and boxes that they were given, their sums of weights."""
    numbers, settings = reference("ld_head_level")
    bins, classes, stride = settings["reg_max"] + 1, settings["num_classes"], settings["stride"]
    gfl = build({**distributions_settings, "bins": bins}, classes).double()
    rows = [numbers[key].permute(0, 2, 3, 1).flatten(1, 2) for key in ("cls_score", "bbox_pred")]
    logits, sides = rows[0].clone(), rows[1].unflatten(2, (4, bins))
    assert torch.equal(numbers["anchors"][0], numbers["anchors"][1])
    centre = (numbers["anchors"][0, :, :2] + numbers["anchors"][0, :, 2:]) / 2
    points = Anchors(torch.cat([centre - stride / 2, centre + stride / 2], 1), ((4, 5),), 1)
    distances = expected(sides, bins_of(bins).double())
    boxes = CODER.decode(distances, points.boxes_A4)
    predictions = DensePredictions((), (), logits, distances, boxes, points, sides_BA4N=sides)
    positive = numbers["labels"] < classes
    matches = iter(torch.where(mask, mask.cumsum(0) - 1, -1) for mask in positive)
    none = torch.zeros(0)
    monkeypatch.setattr(type(gfl), "assign", lambda *_: Assignment(next(matches), none, none))
    truth = [boxes[mask] for boxes, mask in zip(numbers["bbox_targets"], positive, strict=True)]
    labels = [names[mask] for names, mask in zip(numbers["labels"], positive, strict=True)]
    # They let points out of the loss of classes; ours counts all.
    counted = numbers["label_weights"] > 0
    logits[~counted] = -1e9
    losses = gfl.loss(predictions, Targets(truth, labels, [(32, 40)] * 2))
    weight = numbers["weight_sum"]
    assert counted[positive].all()
    assert_near(losses["cls"] * positive.sum() / settings["num_total_samples"], numbers["loss_cls"])
    assert_near(losses["box"] * weight, numbers["loss_bbox"])
    assert_near(losses["dfl"] * weight, numbers["loss_dfl"])


def test_distribution_loss_is_least_where_the_two_bins_share_the_distance():
    wanted = torch.tensor([[2.25, 0.0, 7.5, 3.0]]).double()
    best = torch.full((1, 4, 8), -50.0).double()
    for side, (lower, share) in enumerate([(2, 0.25), (0, 0.0), (6, 0.9), (3, 0.0)]):
        best[0, side, lower], best[0, side, lower + 1] = np.log(1 - share), np.log(share + 1e-300)
    entropy = -(0.25 * np.log(0.25) + 0.75 * np.log(0.75)), 0.0, -(0.9 * np.log(0.9) + 0.1 * np.log(0.1)), 0.0
    assert distribution_focal(best, wanted)[0].tolist() == pytest.approx(entropy, abs=1e-6)
    reached = expected(best, bins_of(8).double())[0].tolist()
    assert reached == pytest.approx([2.25, 0.0, 6.9, 3.0], abs=1e-6)  # 7.5 is out of reach
    rough = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: distribution_focal(x, wanted.expand(2, 4)), rough)


def test_neck_joins_every_stage_with_every_level():
    torch.manual_seed(0)
    neck = PathAggregation([6, 8, 10], 12, 2).eval()
    stages = {str(n): torch.randn(1, c, 64 // 2**n, 48 // 2**n).requires_grad_() for n, c in enumerate([6, 8, 10])}
    levels = neck(stages)
    assert [tuple(level.shape[1:]) for level in levels.values()] == [
        (12, 64, 48),
        (12, 32, 24),
        (12, 16, 12),
        (12, 8, 6),
        (12, 4, 3),
    ]
    for level in levels.values():
        gradients = torch.autograd.grad(level.sum(), list(stages.values()), retain_graph=True)
        assert all(gradient.any() for gradient in gradients)


def test_batch_normalised_towers_are_each_levels_own(build, distributions_settings):
    """Statistics of one level are not those of another; the output convolutions are shared."""
    own, shared = build(distributions_settings), build({**distributions_settings, "head_norm": "group"})
    towers = own.head.classification_head
    assert len({id(towers.tower(n)) for n in range(len(own.strides))}) == len(own.strides)
    assert shared.head.classification_head.tower(0) is shared.head.classification_head.tower(3)
    towers.cls_logits.weight.grad = None
    features = own.features(torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8))
    own.predict(features)
    means = [towers.tower(n)[0][1][1].running_mean for n in range(len(own.strides))]
    assert not torch.equal(means[0], means[1])
