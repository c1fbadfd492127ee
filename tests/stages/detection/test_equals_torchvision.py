"""With equal random weights our detectors compute what torchvision's compute, and its state dicts load strictly.

No published COCO checkpoint can be had where these tests run, so equality is shown with random weights, in double
precision: random heads give near ties, and in single precision two of 1,000 proposals may change places.
"""

import pytest
import torch
from torchvision.models import detection, resnet50
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FrozenBatchNorm2d, clip_boxes_to_image
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from stages.detection.detectors.faster_rcnn import FasterRCNN
from stages.detection.detectors.fcos import FCOS
from stages.detection.detectors.retinanet import RetinaNet
from stages.detection.proposals import SamplingSettings, sample_rois
from stages.detection.records import RoIPredictions, Targets

SIZE = (320, 352)  # P6 and P7 are not whole multiples of their strides here: torchvision's odd anchor strides show
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def randomised(model, eps=0.0):
    """Frozen statistics away from (0, 1), and no bias at zero, so that a missing term shows."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.eps = eps
            module.weight.uniform_(0.5, 1.0, generator=generator)
            module.bias.normal_(0, 0.1, generator=generator)
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    return model.double().eval()


@pytest.fixture(scope="module")
def images():
    return torch.randint(0, 256, (2, 3, *SIZE), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


@pytest.fixture(scope="module")
def targets():
    boxes = [
        torch.tensor([[20.0, 30, 120, 200], [150, 60, 300, 280]]).double(),
        torch.tensor([[5.0, 5, 60, 40]]).double(),
    ]
    return Targets(boxes, [torch.tensor([3, 17]), torch.tensor([3])], [SIZE, SIZE])


def padded(theirs, images):
    """torchvision's normalised batch, without its resize."""
    mean = torch.tensor(theirs.transform.image_mean).double().view(1, 3, 1, 1)
    std = torch.tensor(theirs.transform.image_std).double().view(1, 3, 1, 1)
    return ImageList((images / 255 - mean) / std, [SIZE] * len(images))


@pytest.fixture(scope="module")
def retinanets():
    torch.manual_seed(0)
    body = resnet50(weights=None, norm_layer=FrozenBatchNorm2d)  # as in retinanet_resnet50_fpn with its weights
    pyramid = _resnet_fpn_extractor(body, 3, [2, 3, 4], LastLevelP6P7(2048, 256))
    theirs = randomised(detection.RetinaNet(pyramid, 91))
    ours = RetinaNet(RetinaNet.Config(), 91)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours.double().eval(), theirs


def test_retinanet_logits_deltas_and_boxes(retinanets, images):
    ours, theirs = retinanets
    batch = padded(theirs, images)
    with torch.no_grad():
        features = list(theirs.backbone(batch.tensors).values())
        wanted = theirs.head(features)
        anchors = theirs.anchor_generator(batch, features)
        boxes = torch.stack(
            [theirs.box_coder.decode_single(d, a) for d, a in zip(wanted["bbox_regression"], anchors, strict=True)]
        )
        found = ours.predict(ours.features(images))
    torch.testing.assert_close(found.logits_BAK, wanted["cls_logits"], **TOLERANCE)
    torch.testing.assert_close(found.deltas_BA4, wanted["bbox_regression"], **TOLERANCE)
    torch.testing.assert_close(found.anchors.boxes_A4, anchors[0])
    torch.testing.assert_close(found.boxes_BA4, boxes, rtol=1e-4, atol=1e-3)


def test_retinanet_losses(retinanets, images, targets):
    ours, theirs = retinanets
    batch = padded(theirs, images)
    described = [{"boxes": b, "labels": n} for b, n in zip(targets.boxes, targets.labels, strict=True)]
    with torch.no_grad():
        features = list(theirs.backbone(batch.tensors).values())
        wanted = theirs.compute_loss(described, theirs.head(features), theirs.anchor_generator(batch, features))
        found = ours.loss(ours.predict(ours.features(images)), targets)
    torch.testing.assert_close(found["cls"], wanted["classification"], **TOLERANCE)
    torch.testing.assert_close(found["box"], wanted["bbox_regression"], **TOLERANCE)


@pytest.fixture(scope="module")
def fcos_pair():
    """The numbers of the head are random too: a fresh one has distances near zero and every bias at it."""
    torch.manual_seed(0)
    body = resnet50(weights=None, norm_layer=FrozenBatchNorm2d)
    pyramid = _resnet_fpn_extractor(body, 3, [2, 3, 4], LastLevelP6P7(256, 256))
    theirs = randomised(detection.FCOS(pyramid, 20), eps=1e-5)  # fcos_resnet50_fpn leaves it as it is
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in theirs.head.named_parameters():
            if parameter.ndim == 1 and "cls_logits" not in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        theirs.head.regression_head.bbox_reg.bias.add_(2)
    ours = FCOS(FCOS.Config(), 20)
    ours.load_state_dict(ours.convert(theirs.state_dict(), [f"class {n}" for n in range(20)]), strict=True)
    return ours.double().eval(), theirs


@pytest.fixture(scope="module")
def fcos_outputs(fcos_pair, images):
    """Their features, head and anchors; our predictions."""
    ours, theirs = fcos_pair
    batch = padded(theirs, images)
    with torch.no_grad():
        features = list(theirs.backbone(batch.tensors).values())
        return theirs.head(features), theirs.anchor_generator(batch, features), ours.predict(ours.features(images))


def test_fcos_logits_distances_centerness_and_boxes(fcos_pair, fcos_outputs):
    _, theirs = fcos_pair
    wanted, anchors, found = fcos_outputs
    boxes = torch.stack(
        [theirs.box_coder.decode(d, a) for d, a in zip(wanted["bbox_regression"], anchors, strict=True)]
    )
    torch.testing.assert_close(found.logits_BAK, wanted["cls_logits"], **TOLERANCE)
    torch.testing.assert_close(found.deltas_BA4, wanted["bbox_regression"], **TOLERANCE)
    torch.testing.assert_close(found.quality_BA, wanted["bbox_ctrness"].squeeze(-1), **TOLERANCE)
    torch.testing.assert_close(found.anchors.boxes_A4, anchors[0])
    torch.testing.assert_close(found.boxes_BA4, boxes, rtol=1e-4, atol=1e-3)
    assert (found.deltas_BA4 > 0).any()


def test_fcos_losses(fcos_pair, fcos_outputs, targets):
    ours, theirs = fcos_pair
    outputs, anchors, found = fcos_outputs
    described = [{"boxes": b, "labels": n} for b, n in zip(targets.boxes, targets.labels, strict=True)]
    with torch.no_grad():
        wanted = theirs.compute_loss(described, outputs, anchors, found.anchors.per_level)
        losses = ours.loss(found, targets)
    torch.testing.assert_close(losses["cls"], wanted["classification"], **TOLERANCE)
    torch.testing.assert_close(losses["box"], wanted["bbox_regression"], **TOLERANCE)
    torch.testing.assert_close(losses["centerness"], wanted["bbox_ctrness"], **TOLERANCE)
    assert all(loss > 0 for loss in losses.values())


def test_fcos_candidates_are_the_best_of_what_enters_their_nms(fcos_pair, fcos_outputs):
    """They cut at 1,000 a level, so the best 1,000 of all levels are among theirs; an overlap above 1 suppresses none."""
    ours, theirs = fcos_pair
    outputs, anchors, found = fcos_outputs
    theirs.score_thresh, theirs.nms_thresh, theirs.detections_per_img = 0.0, 2.0, 10**6
    levels = found.anchors.per_level
    split = {name: list(value.split(levels, 1)) for name, value in outputs.items()}
    with torch.no_grad():
        wanted = theirs.postprocess_detections(split, [list(a.split(levels)) for a in anchors], [SIZE, SIZE])
        candidates = ours.candidates(found, 1000)
    for number, theirs_found in enumerate(wanted):
        torch.testing.assert_close(candidates.scores_BN[number], theirs_found["scores"][:1000], **TOLERANCE)
        assert torch.equal(candidates.labels_BN[number], theirs_found["labels"][:1000])
        boxes = clip_boxes_to_image(candidates.boxes_BN4[number], SIZE)
        torch.testing.assert_close(boxes, theirs_found["boxes"][:1000], rtol=1e-4, atol=1e-3)


@pytest.fixture(scope="module")
def faster_rcnns():
    torch.manual_seed(0)
    body = resnet50(weights=None, norm_layer=FrozenBatchNorm2d)
    theirs = randomised(detection.FasterRCNN(_resnet_fpn_extractor(body, 3), 91))
    ours = FasterRCNN(FasterRCNN.Config(), 90)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours.double().eval(), theirs


def test_faster_rcnn_proposals_logits_and_boxes(faster_rcnns, images):
    ours, theirs = faster_rcnns
    batch = padded(theirs, images)
    with torch.no_grad():
        features = theirs.backbone(batch.tensors)
        proposals, _ = theirs.rpn(batch, features)
        pooled = theirs.roi_heads.box_roi_pool(features, proposals, batch.image_sizes)
        logits, deltas = theirs.roi_heads.box_predictor(theirs.roi_heads.box_head(pooled))
        found = ours.predict(ours.features(images))
        decoded = theirs.roi_heads.box_coder.decode(deltas, proposals)
    for ours_found, theirs_found in zip(found.proposals, proposals, strict=True):
        torch.testing.assert_close(ours_found.boxes, theirs_found, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(found.rois.boxes_M4, torch.cat(proposals), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(found.activations.logits, logits, **TOLERANCE)
    torch.testing.assert_close(found.activations.deltas.flatten(1), deltas, **TOLERANCE)
    boxes, scores = ours.roi_heads.decode(found.activations, found.rois)
    torch.testing.assert_close(boxes, decoded[:, 1:], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(scores, logits.softmax(1)[:, 1:], **TOLERANCE)


def test_faster_rcnn_losses(faster_rcnns, images, targets):
    """Sampling is random; with room for every anchor and RoI nothing is left to chance but nothing is sampled out either."""
    ours, theirs = faster_rcnns
    batch = padded(theirs, images)
    described = [{"boxes": b, "labels": n + 1} for b, n in zip(targets.boxes, targets.labels, strict=True)]
    everything = 10**6
    with torch.no_grad():
        features = theirs.backbone(batch.tensors)
        found = ours.predict(ours.features(images))
        for sampler in (theirs.rpn.fg_bg_sampler, ours.rpn.fg_bg_sampler):
            sampler.batch_size_per_image, sampler.positive_fraction = everything, 0.5
        theirs.roi_heads.fg_bg_sampler.batch_size_per_image = everything
        theirs.rpn.training = theirs.roi_heads.training = True
        theirs.rpn._pre_nms_top_n["training"] = theirs.rpn._post_nms_top_n["training"] = 1000
        proposals, first = theirs.rpn(batch, features, described)
        _, second = theirs.roi_heads(features, proposals, batch.image_sizes, described)
        theirs.rpn.training = theirs.roi_heads.training = False
        rois = sample_rois(found.proposals, targets, SamplingSettings(everything))
        activations = ours.roi_head(ours.features(images), rois)
        losses = ours.loss(
            RoIPredictions(found.objectness_BA, found.deltas_BA4, found.anchors, found.proposals, rois, activations),
            targets,
        )
    torch.testing.assert_close(losses["rpn_cls"], first["loss_objectness"], **TOLERANCE)
    torch.testing.assert_close(losses["rpn_box"], first["loss_rpn_box_reg"], **TOLERANCE)
    torch.testing.assert_close(losses["cls"], second["loss_classifier"], **TOLERANCE)
    torch.testing.assert_close(losses["box"], second["loss_box_reg"], **TOLERANCE)
