"""Cascade R-CNN: one stage of it is a Faster R-CNN; the rules between the stages by hand; two-stage pairs."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from stages.detection.cascade import Cascade, refine
from stages.detection.detectors.cascade_rcnn import CascadeRCNN
from stages.detection.proposals import SamplingSettings, sample_rois, unlabelled_rois
from stages.detection.records import Proposals, RoIActivations, RoIs, RoIStage, Targets
from stages.detection.roi_head import RoIHead, RoIHeadConfig
from stages.distillation.assistants.rcnn import RCNN
from stages.distillation.method import in_full

SIZE = (96, 128)
HEAD = RoIHeadConfig(hidden=16, sampling_ratio=1)


@pytest.fixture
def cascade(build, cascade_settings):
    return build(cascade_settings)


@pytest.fixture
def images():
    return torch.randint(0, 256, (2, 3, *SIZE), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


@pytest.fixture
def targets():
    return Targets(
        [torch.tensor([[30.0, 20, 80, 60]]), torch.zeros(0, 4)],
        [torch.tensor([3]), torch.tensor([]).long()],
        [SIZE, (90, 100)],
    )


def predicted(detector, images, targets=None):
    torch.manual_seed(5)  # RoIs are sampled
    return detector.predict(detector.features(images), targets)


def test_one_stage_with_the_same_numbers_is_a_faster_rcnn(build, teacher_settings, images, targets):
    stage = {"iou": 0.5, "box_weights": [10, 10, 5, 5], "weight": 1}
    plain = build(teacher_settings)
    settings = {"cascade": [stage], "class_agnostic": False, "box_beta": 1 / 9, "name": "cascade_rcnn"}
    single = build({**teacher_settings, **settings})
    single.load_state_dict(plain.state_dict(), strict=True)
    ours, theirs = (
        single.loss(predicted(single, images, targets), targets),
        plain.loss(predicted(plain, images, targets), targets),
    )
    assert list(ours) == ["rpn_cls", "rpn_box", "cls_1", "box_1"]
    for (name, mine), other in zip(ours.items(), theirs.values(), strict=True):
        assert mine.item() == other.item(), name
    one, two = single.candidates(predicted(single, images), 30), plain.candidates(predicted(plain, images), 30)
    assert torch.equal(one.boxes_BN4, two.boxes_BN4)
    assert torch.equal(one.scores_BN, two.scores_BN)


def test_three_stages_as_published():
    stages = CascadeRCNN.Config().cascade
    assert [stage.iou for stage in stages] == [0.5, 0.6, 0.7]
    assert [1 / np.array(stage.box_weights) for stage in stages] == [
        pytest.approx(np.array([0.1, 0.1, 0.2, 0.2]) / number) for number in (1, 2, 3)
    ]
    assert [stage.weight for stage in stages] == [1, 0.5, 0.25]
    with pytest.raises(ValidationError, match="cascade"):
        CascadeRCNN.Config(cascade=[])


def test_each_stage_looks_at_the_refined_boxes_of_the_one_before(cascade, images):
    predictions = predicted(cascade, images)
    assert len(predictions.stages) == 3
    assert [head.box_weights[0] for head in cascade.stages] == [10, 20, 30]
    for head, before, after in zip(cascade.stages, predictions.stages, predictions.stages[1:], strict=False):
        # Deltas of x and y in box widths and heights, of width and height in logarithms, each times its weight.
        boxes, deltas = before.rois.boxes_M4.numpy(), before.activations.deltas[:, 0].detach().numpy()
        side, centre = boxes[:, 2:] - boxes[:, :2], (boxes[:, 2:] + boxes[:, :2]) / 2
        weights = np.array(head.box_weights)
        centre = centre + deltas[:, :2] / weights[:2] * side
        side = side * np.exp(deltas[:, 2:] / weights[2:])
        wanted = np.concatenate([centre - side / 2, centre + side / 2], 1).clip(0, [SIZE[1], SIZE[0]] * 2)
        np.testing.assert_allclose(after.rois.boxes_M4.numpy(), wanted, atol=1e-3)
        assert not after.rois.boxes_M4.requires_grad
        assert torch.equal(after.rois.source_M, before.rois.source_M)
        assert torch.equal(after.rois.image_M, before.rois.image_M)


def test_scores_are_averaged_over_the_stages_and_boxes_are_the_last(cascade, images):
    predictions = predicted(cascade, images)
    boxes, scores = cascade.decode(predictions.stages)
    mean = np.mean([stage.activations.logits.softmax(1)[:, 1:].detach().numpy() for stage in predictions.stages], 0)
    np.testing.assert_allclose(scores.detach().numpy(), mean, rtol=1e-5)
    last, _ = cascade.stages[2].decode(predictions.activations, predictions.rois)
    assert torch.equal(boxes, last)
    assert torch.equal(boxes[:, 0], boxes[:, 9])  # class-agnostic
    found = cascade.candidates(predictions, 5)
    rows = predictions.rois.image_M == 0
    assert found.scores_BN[0].detach().numpy() == pytest.approx(np.sort(mean[rows.numpy()].ravel())[::-1][:5], rel=1e-5)


def test_predictions_on_sampled_rois_are_not_decoded(cascade, images, targets):
    with pytest.raises(ValueError, match="sampled with targets; decode what was predicted without"):
        cascade.candidates(predicted(cascade, images, targets), 5)


def test_sampled_stages_ask_for_more_overlap_and_hold_the_ground_truth_once(cascade, images, targets):
    predictions = predicted(cascade, images, targets)
    for stage, iou in zip(predictions.stages, (0.5, 0.6, 0.7), strict=True):
        rois = stage.rois
        x0, y0, x1, y1 = rois.boxes_M4[rois.image_M == 0].numpy().T
        shared = (np.minimum(x1, 80) - np.maximum(x0, 30)).clip(0) * (np.minimum(y1, 60) - np.maximum(y0, 20)).clip(0)
        overlap = shared / ((x1 - x0) * (y1 - y0) + 50 * 40 - shared)
        assert ((overlap >= iou) == (rois.labels_M[rois.image_M == 0].numpy() == 3)).all()
        assert (rois.source_M == -1).sum() == 1
        assert (rois.labels_M[rois.image_M == 1] == -1).all()
        assert rois.boxes_M4[rois.image_M == 1].amax(0).tolist() <= [100, 90, 100, 90]


def test_losses_of_the_stages_are_weighted(cascade, images, targets):
    predictions = predicted(cascade, images, targets)
    losses = cascade.loss(predictions, targets)
    for number, (head, stage, weight) in enumerate(
        zip(cascade.stages, predictions.stages, (1, 0.5, 0.25), strict=True), 1
    ):
        rois, target = stage.rois, (stage.rois.labels_M + 1).numpy()
        logits = stage.activations.logits.detach().double().numpy()
        picked = logits[np.arange(len(target)), target] - np.log(np.exp(logits).sum(1))
        assert losses[f"cls_{number}"].item() == pytest.approx(-weight * picked.mean(), rel=1e-4)
        positive = target > 0
        boxes, truth = rois.boxes_M4.double().numpy()[positive], np.array([30.0, 20, 80, 60])
        side = boxes[:, 2:] - boxes[:, :2]
        shift = ((truth[:2] + truth[2:]) / 2 - (boxes[:, :2] + boxes[:, 2:]) / 2) / side
        wanted = np.concatenate([shift, np.log((truth[2:] - truth[:2]) / side)], 1) * np.array(head.box_weights)
        error = np.abs(stage.activations.deltas[:, 0].detach().double().numpy()[positive] - wanted)
        smooth = np.where(error < 1, error**2 / 2, error - 0.5).sum() / len(target)
        assert losses[f"box_{number}"].item() == pytest.approx(weight * smooth, rel=1e-4)


def test_no_gradient_flows_from_a_stage_to_the_heads_before_it(cascade, images, targets):
    losses = cascade.loss(predicted(cascade, images, targets), targets)
    (losses["cls_3"] + losses["box_3"]).backward()
    assert all(p.grad is not None for p in cascade.stages[2].parameters())
    assert all(p.grad is None for head in cascade.stages[:2] for p in head.parameters())
    assert all(p.grad is None for p in cascade.rpn.parameters())
    assert any(p.grad is not None for p in cascade.backbone.parameters())


def test_refined_boxes_are_those_of_the_true_class_and_leave_the_ground_truth_out():
    """Heads with a box for each class: three RoIs, the first of class 1, the second background, the third ground truth."""
    head = RoIHead(HEAD, 4, (4,), 2)
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 40], [5, 5, 9, 9]])
    rois = RoIs(boxes, torch.zeros(3).long(), torch.tensor([7, 8, -1]), torch.tensor([1, -1, 0]), boxes)
    deltas = torch.zeros(3, 3, 4)
    deltas[:, 1, 0], deltas[:, 2, 0] = 10, -5  # class 0 moves right by a width, class 1 left by half of one
    logits = torch.tensor([[0.0, 5, 1], [9.0, 2, 1], [0, 0, 0]])
    (found,) = refine(head, RoIStage(rois, RoIActivations((), logits, deltas)), [(32, 32)])
    assert isinstance(found, Proposals)
    assert found.boxes.tolist() == [[0, 0, 5, 10], [30, 20, 32, 40 - 8]]
    assert found.source.tolist() == [7, 8]


def test_class_agnostic_heads_are_for_an_assistant_too(cascade, images):
    """The shape travels, and with it the weights: an assistant's head on other strides."""
    for head in cascade.stages:
        made = head.on((8, 16, 32))
        made.load_state_dict(head.state_dict(), strict=True)
        assert (made.strides, made.box_weights, made.class_agnostic) == ((8, 16, 32), head.box_weights, True)
        assert made.box_predictor.bbox_pred.out_features == 4


def test_a_teachers_stage_looks_at_rois_of_an_assistants(cascade, images, targets):
    """What HEAD's cascade assistant needs: with the teacher's weights on the teacher's levels it computes the same."""
    with torch.no_grad():
        features = cascade.features(images)
        assistant = [head.on(cascade.strides) for head in cascade.stages]
        for mine, theirs in zip(assistant, cascade.stages, strict=True):
            mine.load_state_dict(theirs.state_dict())
        found = predicted(cascade, images).proposals
        rois = sample_rois(found, targets, cascade.cascade.samplings[0])
        stages = cascade.cascade.run(assistant, features.levels, rois, targets.sizes, targets)
        for number, stage in enumerate(stages):
            theirs = cascade.roi_head(features, stage.rois, number)
            assert len(theirs.hidden) == 2
            for mine, other in zip(stage.activations.hidden, theirs.hidden, strict=True):
                assert torch.equal(mine, other)


def test_the_rcnn_assistant_imitates_the_first_stage(cascade, build, student_settings):
    student = build(student_settings)
    assistant = RCNN.build(RCNN.Config(), student, cascade)
    theirs = cascade.roi_heads.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in assistant.head.state_dict().items())
    assert cascade.stages[0] is cascade.roi_heads


def test_half_precision_of_every_stage_is_read_in_full(cascade, images):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        predictions = predicted(cascade, images)
    assert predictions.stages[0].activations.logits.dtype == torch.bfloat16
    assert all(stage.activations.logits.dtype == torch.float32 for stage in in_full(predictions).stages)


def test_an_image_without_a_proposal_has_empty_stages():
    """Neither boxes nor objects: nothing to look at, and nothing to learn."""
    heads = [RoIHead(HEAD, 4, (4,), 2, class_agnostic=True) for _ in range(2)]
    rules = Cascade((SamplingSettings(4),) * 2, (1.0, 1.0), 1.0)
    nothing = Proposals(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0).long())
    empty = Targets([torch.zeros(0, 4)], [torch.zeros(0).long()], [(32, 32)])
    for wanted in (None, empty):
        stages = rules.run(heads, (torch.zeros(1, 4, 8, 8),), unlabelled_rois([nothing]), [(32, 32)], wanted)
        losses = rules.loss(heads, stages)
        assert [loss.item() for loss in losses.values()] == [0, 0, 0, 0]
        sum(losses.values()).backward()
    boxes, scores = rules.decode(heads, stages)
    assert (boxes.shape, scores.shape) == ((0, 2, 4), (0, 2))
