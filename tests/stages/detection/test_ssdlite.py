"""SSDLite beside torchvision's with equal weights: outputs, boxes, losses, what enters its NMS; classes by name."""

import pytest
import torch
from torch.nn import functional
from torchvision.models import mobilenet_v3_large
from torchvision.models.detection import ssdlite320_mobilenet_v3_large
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou, clip_boxes_to_image

from pipeline.errors import UserError
from stages.detection.detectors.ssdlite import SSDLite, log_odds, outputs
from stages.detection.records import Targets
from stages.detection.torchvision_weights import COCO_NAMES
from stages.distillation.methods.crosskd import CrossKD
from stages.distillation.methods.head import HEAD

SIZE = (320, 320)
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
CLASSES = 8


@pytest.fixture(scope="module")
def pair():
    """In double precision, with statistics away from (0, 1) and no bias at zero, so that a missing term shows; and with
    convolutions that keep the size of what passes, for fresh ones put it out."""
    torch.manual_seed(0)
    theirs = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=CLASSES + 1)
    for name, tensor in [*theirs.named_parameters(), *theirs.named_buffers()]:
        with torch.no_grad():
            if name.endswith(("running_var", ".1.weight")) and tensor.ndim == 1:
                tensor.uniform_(0.5, 1.5)
            elif tensor.ndim == 4:
                tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5)
            elif tensor.ndim == 1 and tensor.is_floating_point():
                tensor.normal_(0, 0.1)
    theirs = theirs.double().eval()
    ours = SSDLite(SSDLite.Config(), CLASSES)
    ours.load_state_dict(ours.convert(theirs.state_dict(), [f"class {n}" for n in range(CLASSES)]), strict=True)
    return ours.double().eval(), theirs


@pytest.fixture(scope="module")
def said(pair):
    """Their outputs and anchors, our features and predictions, of the same images."""
    ours, theirs = pair
    images = torch.randint(0, 256, (2, 3, *SIZE), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    batch = ImageList(images.double() / 255 * 2 - 1, [SIZE] * 2)
    with torch.no_grad():
        features = list(theirs.backbone(batch.tensors).values())
        own = ours.features(images)
        return theirs.head(features), theirs.anchor_generator(batch, features), own, ours.predict(own)


@pytest.fixture(scope="module")
def targets():
    boxes = [
        torch.tensor([[20.0, 30, 120, 200], [150, 60, 300, 280]]).double(),
        torch.tensor([[5.0, 5, 90, 80]]).double(),
    ]
    return Targets(boxes, [torch.tensor([3, 7]), torch.tensor([3])], [SIZE] * 2)


def test_logits_deltas_anchors_and_boxes(pair, said):
    ours, theirs = pair
    wanted, anchors, features, found = said
    logits = outputs(ours.head.classification_head, features.levels, CLASSES + 1)[1]
    assert wanted["cls_logits"].std(1).min() > 0.1  # cells differ
    torch.testing.assert_close(logits, wanted["cls_logits"], **TOLERANCE)
    torch.testing.assert_close(found.deltas_BA4, wanted["bbox_regression"], **TOLERANCE)
    torch.testing.assert_close(found.anchors.boxes_A4, anchors[0])
    boxes = torch.stack([theirs.box_coder.decode_single(d, anchors[0]) for d in wanted["bbox_regression"]])
    torch.testing.assert_close(found.boxes_BA4, boxes, rtol=1e-4, atol=1e-3)
    chances = wanted["cls_logits"].softmax(-1)
    torch.testing.assert_close(found.logits_BAK.sigmoid(), chances[..., 1:])
    torch.testing.assert_close(found.background_BA.sigmoid(), chances[..., 0])
    assert [len(features.backbone), len(features.levels)] == [4, 6]
    assert [320 // stage.shape[-1] for stage in features.backbone] == [4, 8, 16, 32]
    assert [level.shape[-1] for level in features.levels] == [20, 10, 5, 3, 2, 1]
    assert [level.shape[1] for level in features.levels] == list(ours.channels)


def test_losses(pair, said, targets):
    ours, theirs = pair
    wanted, anchors, _, found = said
    described = [{"boxes": b, "labels": n + 1} for b, n in zip(targets.boxes, targets.labels, strict=True)]
    matches = [theirs.proposal_matcher(box_iou(boxes, anchors[0])) for boxes in targets.boxes]
    with torch.no_grad():
        expected = theirs.compute_loss(described, wanted, anchors, matches)
        losses = ours.loss(found, targets)
    torch.testing.assert_close(losses["cls"], expected["classification"], **TOLERANCE)
    torch.testing.assert_close(losses["box"], expected["bbox_regression"], **TOLERANCE)
    assert all(loss > 0 for loss in losses.values())


def test_candidates_are_the_best_of_what_enters_their_nms(pair, said):
    """They cut at a number a class, so the best of all classes are among theirs; an overlap above 1 suppresses none."""
    ours, theirs = pair
    wanted, anchors, _, found = said
    theirs.score_thresh, theirs.nms_thresh, theirs.detections_per_img, theirs.topk_candidates = 0.0, 2.0, 10**6, 300
    with torch.no_grad():
        expected = theirs.postprocess_detections(dict(wanted), anchors, [SIZE] * 2)
        candidates = ours.candidates(found, 300)
    for number, theirs_found in enumerate(expected):
        torch.testing.assert_close(candidates.scores_BN[number], theirs_found["scores"][:300], **TOLERANCE)
        assert torch.equal(candidates.labels_BN[number], theirs_found["labels"][:300] - 1)
        boxes = clip_boxes_to_image(candidates.boxes_BN4[number], SIZE)
        torch.testing.assert_close(boxes, theirs_found["boxes"][:300], rtol=1e-4, atol=1e-3)


def test_log_odds_hold_at_the_extremes_and_have_the_softmaxs_gradient():
    extreme = torch.tensor([[60.0, 0, -60], [0, 0, 0], [-90, 90, 0]])
    odds = log_odds(extreme)
    assert odds.isfinite().all()
    torch.testing.assert_close(odds.sigmoid(), extreme.softmax(-1), rtol=1e-5, atol=1e-6)
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    label = torch.tensor([0, 2, 4, 1])
    error = -functional.logsigmoid(log_odds(logits).gather(1, label[:, None])).sum()
    wanted = functional.cross_entropy(logits, label, reduction="sum")
    torch.testing.assert_close(error, wanted)
    (found,), (expected,) = (torch.autograd.grad(loss, logits, retain_graph=True) for loss in (error, wanted))
    torch.testing.assert_close(found, expected)


def test_published_classes_are_matched_by_name():
    names = ["dog", "car"]
    ours = SSDLite(SSDLite.Config(width=0.25), len(names))
    published = dict(SSDLite(SSDLite.Config(width=0.25), 90).state_dict())
    for level in range(6):
        key = f"head.classification_head.module_list.{level}.1.bias"
        published[key] = torch.arange(91.0).repeat(6)
    found = ours.convert(published, names)
    rows = [0.0, *(float(COCO_NAMES.index(name)) for name in names)]
    assert found["head.classification_head.module_list.3.1.bias"].tolist() == rows * 6
    ours.load_state_dict(found, strict=True)
    with pytest.raises(ValueError, match=r"not \['plate'\]"):
        ours.convert(published, ["dog", "plate"])


def test_backbone_weights_are_those_of_the_classifier(build):
    torch.manual_seed(1)
    network = mobilenet_v3_large(weights=None, width_mult=0.25).eval()
    student = build({"name": "ssdlite", "width": 0.25, "reduced_tail": False}).eval()
    student.load_backbone(network.state_dict())
    images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        features = student.features(images)
        wanted, stages = student.normalise(images), []
        for part in network.features:
            wanted = part(wanted)
            stages.append(wanted)
    torch.testing.assert_close(features.levels[1], wanted)
    torch.testing.assert_close(features.backbone[0], stages[3])
    torch.testing.assert_close(features.backbone[1], stages[6])
    with pytest.raises(ValueError, match=r"MobileNetV3-Large fits with reduced_tail: false"):
        build({"name": "ssdlite", "width": 0.25}).load_backbone(network.state_dict())


def test_what_needs_one_tower_for_all_levels_is_refused(build, ssd_settings, student_settings, teacher_settings):
    student = build(ssd_settings)
    with pytest.raises(UserError, match="a tower that all levels of a dense student share"):
        CrossKD(CrossKD.Config(convs=1), student, build(student_settings))
    with pytest.raises(UserError, match="those of SSDLite differ from level to level; set ckd: 0"):
        HEAD(HEAD.Config(), student, build(teacher_settings))
    HEAD(HEAD.Config(ckd=0), student, build(teacher_settings))
