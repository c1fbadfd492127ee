"""OpenMMLab's checkpoints: every name has its place, what means something else is refused, and nothing is guessed.

The names below are those of mmdet 3.3.0's models. That the numbers mean the same was compared with mmdet itself
(`benchmarks/openmmlab.py`), which these tests do not need.
"""

import re
from pathlib import Path

import pytest
import torch

from pipeline.errors import UserError
from stages.detection.anchors import AnchorGrid
from stages.detection.load import load_published

YUNET = Path(__file__).parents[4] / "shared/data/weights/yunet_n.pth"
KNOWN = ("dog", "cat", "cow", "emu")  # what the checkpoints know
OURS = ["cow", "dog", "emu"]  # what the data have
BODY = {"backbone": "resnet18", "neck_channels": 8}
SMALL = {
    "retinanet": {**BODY, "name": "retinanet", "head_convs": 1, "anchor_grid": "exact", "extra_relu": False},
    "faster_rcnn": {
        **BODY,
        "name": "faster_rcnn",
        "anchor_grid": "exact",
        "roi_head": {"hidden": 8, "sampling_ratio": 0, "aligned": True},
    },
    "fcos": {
        **BODY,
        "name": "fcos",
        "head_convs": 1,
        "points": "centre",
        "level_scales": True,
        "distance": "exp",
        "centerness_tower": "class",
    },
}
PIXELS = "mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375]"
RESNET = (
    "backbone=dict(type='ResNet', depth=18, num_stages=4, out_indices=(0, 1, 2, 3), style='pytorch', norm_eval=True)"
)
CODER = "bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_means=[0.0, 0.0, 0.0, 0.0], target_stds=[{}])"
HEADS = {
    "retinanet": f"""type='RetinaNet', neck=dict(type='FPN', in_channels=[64, 128, 256, 512], out_channels=8, start_level=1,
        add_extra_convs='on_input', num_outs=5), bbox_head=dict(type='RetinaHead', num_classes=4, in_channels=8, stacked_convs=1,
        feat_channels=8, anchor_generator=dict(type='AnchorGenerator', octave_base_scale=4, scales_per_octave=3,
        ratios=[0.5, 1.0, 2.0], strides=[8, 16, 32, 64, 128]), {CODER.format("1.0, 1.0, 1.0, 1.0")},
        loss_cls=dict(type='FocalLoss'))""",
    "faster_rcnn": f"""type='FasterRCNN', neck=dict(type='FPN', in_channels=[64, 128, 256, 512], out_channels=8, num_outs=5),
        rpn_head=dict(type='RPNHead', in_channels=8, feat_channels=8, anchor_generator=dict(type='AnchorGenerator', scales=[8],
        ratios=[0.5, 1.0, 2.0], strides=[4, 8, 16, 32, 64]), {CODER.format("1.0, 1.0, 1.0, 1.0")}), roi_head=dict(
        type='StandardRoIHead', bbox_roi_extractor=dict(type='SingleRoIExtractor', roi_layer=dict(type='RoIAlign',
        output_size=7, sampling_ratio=0), out_channels=8, featmap_strides=[4, 8, 16, 32]), bbox_head=dict(
        type='Shared2FCBBoxHead', in_channels=8, fc_out_channels=8, roi_feat_size=7, num_classes=4,
        {CODER.format("0.1, 0.1, 0.2, 0.2")}, reg_class_agnostic=False))""",
    "fcos": """type='FCOS', neck=dict(type='FPN', in_channels=[64, 128, 256, 512], out_channels=8, start_level=1,
        add_extra_convs='on_output', num_outs=5, relu_before_extra_convs=True), bbox_head=dict(type='FCOSHead', num_classes=4,
        in_channels=8, stacked_convs=1, feat_channels=8, strides=[8, 16, 32, 64, 128])""",
}


def text(name, pixels=f"{PIXELS}, bgr_to_rgb=True", body=RESNET, **changes):
    """A training's settings as version 3 writes them."""
    model = HEADS[name]
    for old, new in changes.values():
        assert old in model
        model = model.replace(old, new)
    return (
        f"model = dict(data_preprocessor=dict(type='DetDataPreprocessor', {pixels}), {body}, {model})\nlr = 0.1 * 2\n"
    )


def theirs(detector, name):
    """A state dict of random numbers under OpenMMLab's names, written down independently of the loader: from the file's names
    to the shapes, by looking the shapes up in our detector where both have the same."""
    own = detector.state_dict()
    state = {
        key.replace("backbone.body", "backbone"): torch.rand_like(value) + 0.5
        if value.ndim == 1
        else torch.randn_like(value) / 30
        for key, value in own.items()
        if key.startswith("backbone.body")
    }
    conv = {"weight": (8, 8, 3, 3), "bias": (8,)}

    def put(module, **shapes):
        state.update({f"{module}.{part}": torch.randn(shape) for part, shape in shapes.items()})

    widths = (64, 128, 256, 512)[0 if name == "faster_rcnn" else 1 :]
    for n, width in enumerate(widths):
        put(f"neck.lateral_convs.{n}.conv", weight=(8, width, 1, 1), bias=(8,))
        put(f"neck.fpn_convs.{n}.conv", **conv)
    if name == "faster_rcnn":
        put("rpn_head.rpn_conv", **conv)
        put("rpn_head.rpn_cls", weight=(3, 8, 1, 1), bias=(3,))
        put("rpn_head.rpn_reg", weight=(12, 8, 1, 1), bias=(12,))
        put("roi_head.bbox_head.shared_fcs.0", weight=(8, 8 * 49), bias=(8,))
        put("roi_head.bbox_head.shared_fcs.1", weight=(8, 8), bias=(8,))
        put("roi_head.bbox_head.fc_cls", weight=(5, 8), bias=(5,))
        put("roi_head.bbox_head.fc_reg", weight=(16, 8), bias=(16,))
        return state
    put("neck.fpn_convs.3.conv", weight=(8, 512 if name == "retinanet" else 8, 3, 3), bias=(8,))
    put("neck.fpn_convs.4.conv", **conv)
    for kind in ("cls_convs", "reg_convs"):
        put(f"bbox_head.{kind}.0.conv", **(conv if name == "retinanet" else {"weight": (8, 8, 3, 3)}))
    if name == "retinanet":
        put("bbox_head.retina_cls", weight=(36, 8, 3, 3), bias=(36,))
        put("bbox_head.retina_reg", weight=(36, 8, 3, 3), bias=(36,))
        return state
    for kind in ("cls_convs", "reg_convs"):
        put(f"bbox_head.{kind}.0.gn", weight=(8,), bias=(8,))
    put("bbox_head.conv_cls", weight=(4, 8, 3, 3), bias=(4,))
    put("bbox_head.conv_reg", weight=(4, 8, 3, 3), bias=(4,))
    put("bbox_head.conv_centerness", weight=(1, 8, 3, 3), bias=(1,))
    state.update({f"bbox_head.scales.{n}.scale": torch.rand(()) + 0.5 for n in range(5)})
    return state


@pytest.fixture
def load(build, tmp_path):
    """A function that saves a checkpoint and loads it into a small detector: the detector and what was saved."""

    def saved(name, config=None, changed=None, meta=None, **settings):
        detector = build({**SMALL[name], **settings}, len(OURS))
        state = theirs(detector, name) if changed is None else changed(theirs(detector, name))
        meta = meta or {"cfg": config or text(name), "dataset_meta": {"classes": KNOWN}, "epoch": 12}
        torch.save({"meta": meta, "state_dict": state}, tmp_path / "theirs.pth")
        load_published(detector, tmp_path / "theirs.pth", OURS)
        return detector.eval(), state

    return saved


@pytest.mark.parametrize("name", SMALL)
def test_every_tensor_has_its_place(name, load):
    """The loader is strict; what is left is that numbers went where they belong."""
    torch.manual_seed(0)
    detector, state = load(name)
    body, fpn = detector.backbone.body, detector.backbone.fpn
    assert torch.equal(body.layer3[1].conv2.weight, state["backbone.layer3.1.conv2.weight"])
    # Theirs add 1e-5 to the variance; frozen ones here add nothing.
    assert torch.equal(body.layer1[0].bn1.running_var, state["backbone.layer1.0.bn1.running_var"] + 1e-5)
    assert torch.equal(fpn.inner_blocks[2][0].weight, state["neck.lateral_convs.2.conv.weight"])
    assert torch.equal(fpn.layer_blocks[0][0].bias, state["neck.fpn_convs.0.conv.bias"])
    if name != "faster_rcnn":
        assert torch.equal(fpn.extra_blocks.p6.weight, state["neck.fpn_convs.3.conv.weight"])
        assert torch.equal(fpn.extra_blocks.p7.weight, state["neck.fpn_convs.4.conv.weight"])


def test_dense_classes_are_matched_by_name_for_each_anchor(load):
    detector, state = load("retinanet")
    theirs_A4 = state["bbox_head.retina_cls.bias"].view(9, 4)
    found = detector.head.classification_head.cls_logits.bias.view(9, 3)
    assert torch.equal(found, theirs_A4[:, [2, 0, 3]])  # cow, dog, emu
    assert torch.equal(detector.head.regression_head.bbox_reg.bias, state["bbox_head.retina_reg.bias"])


def test_background_comes_first_here_and_last_there(load):
    detector, state = load("faster_rcnn")
    predictor = detector.roi_heads.box_predictor
    assert torch.equal(predictor.cls_score.weight, state["roi_head.bbox_head.fc_cls.weight"][[4, 2, 0, 3]])
    boxes = state["roi_head.bbox_head.fc_reg.bias"].view(4, 4)
    assert torch.equal(predictor.bbox_pred.bias.view(4, 4)[1:], boxes[[2, 0, 3]])
    assert detector.roi_heads.box_weights == (10, 10, 5, 5)  # one over the deviations .1 .1 .2 .2


def test_fcos_computes_by_their_rules(load):
    """Points in the middle of cells, exp of the scaled numbers in pixels, centerness on the tower of the classes."""
    detector, _ = load("fcos")
    images = torch.randint(0, 256, (1, 3, 256, 256), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    with torch.no_grad():
        detector.head.regression_head.bbox_reg.weight.mul_(0.01)
        features = detector.features(images)
        found = detector.predict(features)
        level, head = features.levels[1], detector.head.regression_head
        raw = head.bbox_reg(head.conv(level)) * head.scales[1]
        centerness = head.bbox_ctrness(detector.head.classification_head.conv(level)).flatten()
    cell = 32 * 32 + 16 + 1  # level 1 follows 32 x 32 points; second row, second column of 16 x 16
    left, top, right, bottom = raw[0, :, 1, 1].exp()
    wanted = torch.stack([24 - left, 24 - top, 24 + right, 24 + bottom])  # (1 + 0.5) * 16
    torch.testing.assert_close(found.boxes_BA4[0, cell], wanted)
    torch.testing.assert_close(found.quality_BA[0, cell], centerness[17])


def test_exact_anchors_are_neither_rounded_nor_moved_by_a_canvas_that_does_not_divide():
    """Their generator: side * sqrt(ratio) about multiples of the stride."""
    grid = AnchorGrid((8, 128), 4.0, 3, (0.5, 2.0), "exact")
    boxes = grid((torch.zeros(1, 1, 5, 4), torch.zeros(1, 1, 2, 2)), (40, 32)).boxes_A4
    assert boxes.shape == ((20 + 4) * 6, 4)
    side = 4 * 8 * 2 ** (1 / 3)
    half = torch.tensor([side / 0.5**0.5, side * 0.5**0.5]) / 2
    torch.testing.assert_close(
        boxes[(4 + 2) * 6 + 1], torch.cat([torch.tensor([16.0, 8]) - half, torch.tensor([16.0, 8]) + half])
    )
    last = boxes[-1]
    torch.testing.assert_close((last[:2] + last[2:]) / 2, torch.tensor([128.0, 128.0]))


def test_p7_has_no_relu_before_it(load):
    detector, _ = load("retinanet")
    with torch.no_grad():
        levels = detector.features(torch.full((1, 3, 128, 128), 90, dtype=torch.uint8)).levels
        assert (levels[3] < 0).any()
        torch.testing.assert_close(levels[4], detector.backbone.fpn.extra_blocks.p7(levels[3]))


def test_blue_first_networks_are_turned(load):
    caffe = "mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0], bgr_to_rgb=False"
    detector, state = load("retinanet", text("retinanet", caffe), pixel_std=[1, 1, 1])
    assert torch.equal(detector.backbone.body.conv1.weight, state["backbone.conv1.weight"].flip(1))
    assert detector.mean.flatten().tolist() == pytest.approx([123.675, 116.28, 103.53])


def test_version_2_says_the_same_elsewhere(load):
    config = re.sub(r"data_preprocessor=dict\(.*?\), ", "", text("retinanet"))
    config += (
        f"img_norm_cfg = dict({PIXELS}, to_rgb=True)\ntest_pipeline = [dict(type='Normalize', {PIXELS}, to_rgb=True)]\n"
    )
    detector, state = load("retinanet", meta={"config": config, "CLASSES": KNOWN})
    assert torch.equal(detector.backbone.body.conv1.weight, state["backbone.conv1.weight"])


def test_every_setting_that_differs_is_named_at_once(load):
    caffe = "mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0], bgr_to_rgb=False"
    body = RESNET.replace("pytorch", "caffe")
    with pytest.raises(UserError) as caught:
        load("retinanet", text("retinanet", caffe, body), anchor_grid="whole", extra_relu=True)
    message = str(caught.value)
    for part in (
        "pixel_std: [1.0, 1.0, 1.0] (not [58.395, 57.12, 57.375])",
        "backbone: {'name': 'resnet', 'variant': 'resnet18', 'style': 'caffe'}",
        "anchor_grid: exact (not whole)",
        "extra_relu: False (not True)",
    ):
        assert part in message
    assert "neck_channels" not in message


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"body": RESNET.replace("style=", "dcn=dict(type='DCNv2'), style=")}, "its backbone has {'dcn'"),
        ({"body": RESNET.replace("'ResNet'", "'ResNeXt'")}, "its backbone is a ResNeXt"),
        ({"a": ("type='FPN'", "type='PAFPN'")}, "its neck is a PAFPN"),
        ({"a": ("1.0, 1.0, 1.0, 1.0", "0.1, 0.1, 0.2, 0.2")}, "bbox_coder.target_stds"),
        ({"a": ("'RetinaNet'", "'ATSS'")}, "an OpenMMLab ATSS, of theirs it loads RetinaNet"),
        ({"pixels": "mean=[0, 0, 0], std=[1, 1, 1], bgr_to_rgb=True"}, "set pixel_mean: "),
    ],
)
def test_what_cannot_be_expressed_is_refused(change, said, load):
    with pytest.raises(UserError, match=re.escape(said)):
        load("retinanet", text("retinanet", **change))


def test_unknown_keys_are_listed(load):
    def odd(state):
        return {**state, "bbox_head.atss_reg.weight": torch.ones(1), "neck.gn.weight": torch.ones(1)}

    with pytest.raises(UserError, match=r"2 unmatched keys: bbox_head\.atss_reg\.weight, neck\.gn\.weight"):
        load("retinanet", changed=odd)


def test_a_lost_tensor_is_missed(load):
    with pytest.raises(UserError, match=r"1 tensors are missing \(head\.regression_head\.bbox_reg\.bias\)"):
        load("retinanet", changed=lambda state: {k: v for k, v in state.items() if k != "bbox_head.retina_reg.bias"})


def test_mask_heads_are_left_out_and_said(load, caplog):
    with caplog.at_level("INFO"):
        load(
            "faster_rcnn",
            text("faster_rcnn", a=("'FasterRCNN'", "'MaskRCNN'")),
            lambda state: {**state, "roi_head.mask_head.convs.0.conv.weight": torch.ones(1)},
        )
    assert "1 tensors of the mask head are left out" in caplog.text


def test_a_file_without_its_config_is_refused(load):
    with pytest.raises(UserError, match="without its config in `meta`"):
        load("retinanet", meta={"CLASSES": KNOWN})


def test_a_class_that_the_file_does_not_know_is_refused(load):
    with pytest.raises(UserError, match=r"knows 3 classes, not \['emu'\]"):
        load("retinanet", meta={"cfg": text("retinanet"), "dataset_meta": {"classes": KNOWN[:3]}})


@pytest.mark.skipif(not YUNET.is_file(), reason="../shared/data/weights/yunet_n.pth is not beside the checkout")
def test_a_real_file_of_another_architecture_is_refused_with_its_keys(build):
    detector = build(SMALL["retinanet"], 1)
    with pytest.raises(UserError) as caught:
        load_published(detector, YUNET, ["FG"])
    assert "208 unmatched keys: backbone.model0.conv1.weight" in str(caught.value)
    assert "bbox_head.multi_level_kps.2.conv2.bias" in str(caught.value)
