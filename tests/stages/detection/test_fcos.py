"""FCOS beside its equality with torchvision: which point learns what, by hand; HEAD's tower."""

import numpy as np
import pytest
import torch

from stages.detection.detectors.fcos import FCOS
from stages.detection.records import DensePredictions, ProposalSettings, Targets
from stages.detection.torchvision_weights import COCO_NAMES
from stages.distillation.methods.head import HEAD
from stages.distillation.task import DistillationTask
from stages.training.clock import Clock

SIZE = (128, 192)  # whole multiples of all strides


@pytest.fixture
def fcos(build, points_settings):
    return build(points_settings)


@pytest.fixture
def images():
    return torch.randint(0, 256, (3, 3, *SIZE), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def matches_by_hand(truth, strides, radius, reach):
    """Point after point as arXiv 1904.01355, section 3.2, says it, with centre sampling."""
    result = []
    for number, stride in enumerate(strides):
        low = 0 if number == 0 else reach * stride / 2
        high = np.inf if number == len(strides) - 1 else reach * stride
        for y in range(0, SIZE[0] // stride * stride, stride):
            for x in range(0, SIZE[1] // stride * stride, stride):
                best = (np.inf, -1)
                for index, (x0, y0, x1, y1) in enumerate(truth):
                    sides = (x - x0, y - y0, x1 - x, y1 - y)
                    off = max(abs(x - (x0 + x1) / 2), abs(y - (y0 + y1) / 2))
                    if min(sides) > 0 and off < radius * stride and low < max(sides) < high:
                        best = min(best, ((x1 - x0) * (y1 - y0), index))
                result.append(best[1])
    return result


def test_each_point_learns_the_smallest_object_that_it_may(fcos, images):
    rng = np.random.default_rng(0)
    corner, side = rng.uniform(0, 60, (12, 2)), rng.uniform(8, 60, (12, 2))
    truth = np.concatenate([corner, corner + side], 1)
    predictions = fcos.predict(fcos.features(images))
    found = fcos.rules.match(torch.from_numpy(truth).float(), predictions.anchors).tolist()
    assert found == matches_by_hand(truth.astype(np.float32), fcos.strides, 1.5, 2)
    assert len(set(found)) > 4


def test_losses_of_one_point_by_hand(fcos, images):
    """One object, which one point learns, with distances of our choice."""
    predictions = fcos.predict(fcos.features(images[:1]))
    boxes_A4 = predictions.anchors.boxes_A4
    truth = torch.tensor([[37.0, 36, 45, 46]])
    (point,) = torch.where(fcos.rules.match(truth, predictions.anchors) == 0)[0].tolist()
    assert boxes_A4[point].tolist() == [36, 36, 44, 44]
    boxes = predictions.boxes_BA4.detach().clone()
    boxes[0, point] = torch.tensor([36.0, 36, 44, 44])
    logits = torch.full_like(predictions.logits_BAK, -50.0)  # all other points are sure of background
    logits[0, point, 7] = 0.0
    quality = torch.full_like(predictions.quality_BA, 0.5)
    made = DensePredictions(
        (), (), logits.detach(), predictions.deltas_BA4, boxes, predictions.anchors, quality.detach()
    )
    losses = fcos.loss(made, Targets([truth], [torch.tensor([7])], [SIZE]))
    # Focal loss at probability 1/2: .25 * (1/2)^2 * log 2.
    assert losses["cls"].item() == pytest.approx(0.25 * 0.25 * np.log(2), rel=1e-5)
    overlap, union, hull = 7 * 8, 64 + 80 - 7 * 8, 9 * 10
    assert losses["box"].item() == pytest.approx(1 - (overlap / union - (hull - union) / hull), rel=1e-5)
    wanted = np.sqrt((3 / 5) * (4 / 6))  # sides of the object from (40, 40): left 3, right 5, top 4, bottom 6
    p = 1 / (1 + np.exp(-0.5))
    assert losses["centerness"].item() == pytest.approx(-wanted * np.log(p) - (1 - wanted) * np.log(1 - p), rel=1e-5)


def test_centerness_weighs_candidates_and_not_proposals(fcos, images):
    with torch.no_grad():
        plain = fcos.predict(fcos.features(images))
        other = DensePredictions(
            plain.class_tower,
            plain.box_tower,
            plain.logits_BAK,
            plain.deltas_BA4,
            plain.boxes_BA4,
            plain.anchors,
            plain.quality_BA.flip(1) * 50,
        )
        before, after = fcos.candidates(plain, 20), fcos.candidates(other, 20)
        settings = ProposalSettings(20, 0.7, 30)
        first, second = (fcos.proposals(p, [SIZE] * 3, settings) for p in (plain, other))
    expected = (plain.logits_BAK.sigmoid() * plain.quality_BA.sigmoid()[..., None]).sqrt()
    torch.testing.assert_close(before.scores_BN[:, 0], expected.flatten(1).amax(1))
    rows = torch.arange(3)[:, None]
    torch.testing.assert_close(before.scores_BN, expected[rows, before.source_BN, before.labels_BN])
    assert not torch.equal(before.source_BN, after.source_BN)
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one.source, two.source)
        assert torch.equal(one.scores, two.scores)


def test_published_classes_are_matched_by_name():
    config = FCOS.Config(backbone="tiny", neck_channels=16, head_convs=1)
    state = {
        "head.classification_head.conv.0.weight": torch.zeros(16, 16, 3, 3),
        "head.classification_head.conv.1.weight": torch.zeros(16),
        "head.classification_head.cls_logits.weight": torch.arange(91.0)[:, None, None, None].expand(91, 16, 3, 3),
        "head.classification_head.cls_logits.bias": torch.arange(91.0),
    }
    found = FCOS(config, 2).convert(state, ["dog", "car"])
    wanted = [COCO_NAMES.index("dog"), COCO_NAMES.index("car")]
    assert found["head.classification_head.cls_logits.bias"].tolist() == wanted
    assert found["head.classification_head.cls_logits.weight"][:, 0, 0, 0].tolist() == wanted
    assert {"head.classification_head.conv.0.0.weight", "head.classification_head.conv.0.1.weight"} <= found.keys()
    with pytest.raises(ValueError, match=r"not \['plate'\]"):
        FCOS(config, 2).convert(state, ["dog", "plate"])


def test_head_helps_an_fcos_student(fcos, images, build, teacher_settings):
    """One anchor a cell: the cell of a proposal is its source itself."""
    teacher = build(teacher_settings)
    method = HEAD(HEAD.Config(rois=8, proposals=16, warmup=0), fcos, teacher)
    task = DistillationTask(fcos, teacher, {"head": method}).train()
    targets = Targets([torch.tensor([[30.0, 20, 80, 60]])] * 3, [torch.tensor([3])] * 3, [SIZE] * 3)
    losses = task(images, targets, Clock(5, 100, 10))
    assert {"student/centerness", "head/akd", "head/ckd"} <= losses.keys()
    losses["head/ckd"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in fcos.head.classification_head.conv.parameters())
    assert all(p.grad is None for p in fcos.head.regression_head.parameters())
    assert all(p.grad is None for p in fcos.head.classification_head.cls_logits.parameters())
