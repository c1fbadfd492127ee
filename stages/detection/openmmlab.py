"""OpenMMLab's detection checkpoints (mmdet 2.x and 3.x) for our detectors: another name for each tensor, and the settings that
must be equal for the same numbers to mean the same boxes.

What the file says of its training (`meta`) is compared with our settings; every difference is an error that says what to
set. What no setting expresses (deformable convolutions, another neck ...) is refused. Names and meanings are those of
mmdet 3.3.0: models/detectors, necks/fpn.py, dense_heads/{rpn,retina,fcos}_head.py, roi_heads/bbox_heads/convfc_bbox_head.py.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.config import Choice
from pipeline.log import logger
from stages.detection.backbone import Backbone
from stages.detection.detector import Detector
from stages.detection.pyramid import carry_eps
from stages.detection.torchvision_weights import select_rows

# Theirs to ours; {n} counts. What follows the last dot (weight, bias, statistics) is the same.
NAMES = (
    ("backbone.", "backbone.body."),
    ("neck.lateral_convs.{n}.conv.", "backbone.fpn.inner_blocks.{n}.0."),
    ("neck.fpn_convs.{n}.conv.", "backbone.fpn.layer_blocks.{n}.0."),
    ("rpn_head.rpn_conv.", "rpn.head.conv.0.0."),
    ("rpn_head.rpn_cls.", "rpn.head.cls_logits."),
    ("rpn_head.rpn_reg.", "rpn.head.bbox_pred."),
    ("roi_head.bbox_head.shared_fcs.0.", "roi_heads.box_head.fc6."),
    ("roi_head.bbox_head.shared_fcs.1.", "roi_heads.box_head.fc7."),
    ("roi_head.bbox_head.fc_cls.", "roi_heads.box_predictor.cls_score."),
    ("roi_head.bbox_head.fc_reg.", "roi_heads.box_predictor.bbox_pred."),
    ("bbox_head.cls_convs.{n}.conv.", "head.classification_head.conv.{n}.0."),
    ("bbox_head.reg_convs.{n}.conv.", "head.regression_head.conv.{n}.0."),
    ("bbox_head.cls_convs.{n}.gn.", "head.classification_head.conv.{n}.1."),
    ("bbox_head.reg_convs.{n}.gn.", "head.regression_head.conv.{n}.1."),
    ("bbox_head.conv_cls.", "head.classification_head.cls_logits."),
    ("bbox_head.conv_reg.", "head.regression_head.bbox_reg."),
    ("bbox_head.conv_centerness.", "head.regression_head.bbox_ctrness."),
    ("bbox_head.scales.{n}.scale", "head.regression_head.scales.{n}"),
    ("bbox_head.retina_cls.", "head.classification_head.cls_logits."),
    ("bbox_head.retina_reg.", "head.regression_head.bbox_reg."),
)
DROPPED = "roi_head.mask_head."
# Their settings that change no number at inference, or that `_backbone`, `_neck` and the heads' functions read.
_READ = {
    "backbone": "depth style num_stages out_indices norm_cfg frozen_stages norm_eval zero_init_residual with_cp",
    "neck": "in_channels out_channels num_outs start_level add_extra_convs relu_before_extra_convs",
    "rpn_head": "in_channels feat_channels anchor_generator bbox_coder",
    "bbox_head": "in_channels feat_channels stacked_convs num_classes anchor_generator bbox_coder fc_out_channels "
    "roi_feat_size reg_class_agnostic strides norm_on_bbox centerness_on_reg center_sampling center_sample_radius conv_bias",
}
_TRAINING = re.compile(r"type|init_cfg|pretrained|loss_\w+|reg_decoded_bbox|train_cfg|test_cfg")


def is_openmmlab(content: Mapping[str, Any]) -> bool:
    """Whether what a file holds was written by OpenMMLab's runner."""
    return isinstance(content.get("meta"), Mapping) and isinstance(content.get("state_dict"), Mapping)


def convert(detector: Detector, content: Mapping[str, Any], class_names: Sequence[str]) -> dict[str, Tensor]:
    """The state dict of `detector` from a checkpoint, its classes matched by name.

    Raises ValueError naming the tensors that have no place here, the settings to change, what cannot be expressed, or the
    classes that the checkpoint does not know.
    """
    state = {key: value for key, value in content["state_dict"].items() if not key.startswith(DROPPED)}
    if dropped := len(content["state_dict"]) - len(state):
        logger.info("weights: %d tensors of the mask head are left out; boxes are all that is read", dropped)
    settings = config_of(content["meta"])
    model = settings.get("model", {})
    if model.get("type") not in detector.openmmlab:
        own, known = detector.state_dict(), ", ".join(detector.openmmlab) or "nothing"
        unmatched = [key for key in state if ours(key) not in own]
        raise ValueError(
            f"an OpenMMLab {model.get('type')}, of theirs it loads {known}; {len(unmatched)} unmatched keys: "
            + ", ".join(unmatched)
        )
    named = {key: ours(key) for key in state}
    if unmatched := [key for key, new in named.items() if new is None]:
        raise ValueError(f"an OpenMMLab file with {len(unmatched)} unmatched keys: {', '.join(unmatched)}")
    mean, std, rgb = _pixels(settings)
    order = slice(None) if rgb else slice(None, None, -1)
    wanted = {"pixel_mean": tuple(mean[order]), "pixel_std": tuple(std[order]), **_KINDS[model["type"]](model)}
    if different := list(differences(detector.config, wanted)):
        raise ValueError(f"it was trained with other settings; set {'; '.join(different)}")
    result = {str(new): state[key] for key, new in named.items()}
    if not rgb:
        result["backbone.body.conv1.weight"] = result["backbone.body.conv1.weight"].flip(1)
    extra_levels(result, int(model["neck"]["num_outs"]))
    for key in [key for key in result if re.fullmatch(r"head\.\w+\.conv\.\d+\.1\.weight", key)]:
        # A convolution before a normalisation may have no bias of theirs; ours has one.
        result.setdefault(key.replace(".1.weight", ".0.bias"), torch.zeros_like(result[key]))
    select_classes(result, classes_of(content["meta"]), class_names)
    body = detector.get_submodule("backbone.body")
    assert isinstance(body, Backbone)
    return carry_eps(result, body, "backbone.body.")


def ours(key: str) -> str | None:
    """Our name of a tensor of theirs; None where there is none."""
    for theirs, name in NAMES:
        found = re.match(re.escape(theirs).replace(r"\{n\}", r"(\d+)"), key)
        if found:
            return name.replace("{n}", found[1] if found.groups() else "") + key[found.end() :]
    return None


def extra_levels(state: dict[str, Tensor], levels: int) -> None:
    """Rename the neck's convolutions above P5, which follow its others in their numbers, in place."""
    lateral = sum(key.startswith("backbone.fpn.inner_blocks.") and key.endswith("0.weight") for key in state)
    for number, name in zip(range(lateral, levels), ("p6", "p7"), strict=False):
        for part in ("weight", "bias"):
            tensor = state.pop(f"backbone.fpn.layer_blocks.{number}.0.{part}", None)
            if tensor is not None:
                state[f"backbone.fpn.extra_blocks.{name}.{part}"] = tensor


def select_classes(state: dict[str, Tensor], known: Sequence[str], class_names: Sequence[str]) -> None:
    """Keep our classes, in our order, in place. Background is their last class and our first; their boxes have none.

    Raises ValueError where a class of ours is not among theirs.
    """
    foreign = [name for name in class_names if name not in known]
    if foreign:
        raise ValueError(
            f"the checkpoint knows {len(known)} classes, not {foreign[:3]}; load its backbone only, or train"
        )
    rows, count = [list(known).index(name) for name in class_names], len(known)
    for part in ("weight", "bias"):
        dense, logits, boxes = (
            f"{layer}.{part}"
            for layer in (
                "head.classification_head.cls_logits",
                "roi_heads.box_predictor.cls_score",
                "roi_heads.box_predictor.bbox_pred",
            )
        )
        if dense in state:
            state[dense] = select_rows(state[dense], rows, len(state[dense]) // count, count, 1)
        if logits in state:
            state[logits] = state[logits][[count, *rows]]
            kept = select_rows(state[boxes], rows, 1, count, 4)
            state[boxes] = torch.cat([torch.zeros_like(kept[:4]), kept])


def config_of(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The training's settings, which a checkpoint carries as Python text (`config` in 2.x, `cfg` in 3.x); nothing is run.

    Raises ValueError where there is none: colours and strides would be guessed.
    """
    text = meta.get("cfg") or meta.get("config")
    if not isinstance(text, str):
        raise ValueError("an OpenMMLab file without its config in `meta`, so its colours and strides are not known")
    found = {}
    for line in ast.parse(text).body:
        if isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name):
            try:
                found[line.targets[0].id] = ast.literal_eval(_Dicts().visit(line.value))
            except ValueError:  # an expression; what is missing then is refused by who reads it
                continue
    return found


class _Dicts(ast.NodeTransformer):
    """`dict(a=1)` to `{'a': 1}`, which can be read without running it."""

    def visit_Call(self, node: ast.Call) -> ast.AST:  # the name ast looks for
        self.generic_visit(node)
        if isinstance(node.func, ast.Name) and node.func.id == "dict" and not node.args:
            return ast.Dict([ast.Constant(one.arg) for one in node.keywords], [one.value for one in node.keywords])
        return node


def classes_of(meta: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the classes that a checkpoint knows. Raises ValueError where it does not say."""
    inside = meta.get("dataset_meta") or {}
    names = inside.get("classes") or inside.get("CLASSES") or meta.get("CLASSES")
    if not names:
        raise ValueError("an OpenMMLab file that does not name its classes in `meta`")
    return tuple(names)


def differences(config: Any, wanted: Mapping[str, Any]) -> Iterator[str]:
    """`setting: value (not the value given)` of all settings of ours that are not as wanted."""
    for path, value in wanted.items():
        given = config
        for part in path.split("."):
            given = getattr(given, part)
        given = given.dump() if isinstance(given, Choice) else given
        if given != value:
            shown = list(value) if isinstance(value, tuple) else value
            yield f"{path}: {shown} (not {list(given) if isinstance(given, tuple) else given})"


def _pixels(settings: Any) -> tuple[list[float], list[float], bool]:
    """Mean and standard deviation in the order of the network's channels, and whether that is red, green, blue."""
    prepared = settings.get("model", {}).get("data_preprocessor") or settings.get("data_preprocessor")
    if prepared:
        return list(prepared["mean"]), list(prepared["std"]), bool(prepared.get("bgr_to_rgb", False))
    waiting = [settings]
    while waiting:
        one = waiting.pop()
        if isinstance(one, Mapping) and one.get("type") == "Normalize":
            return list(one["mean"]), list(one["std"]), bool(one.get("to_rgb", True))
        waiting += one.values() if isinstance(one, Mapping) else one if isinstance(one, list | tuple) else ()
    raise ValueError("an OpenMMLab file whose config has no Normalize, so its colours are not known")


def _only(part: Mapping[str, Any], kind: str, *types: str) -> Mapping[str, Any]:
    """A part of their model, if it is of one of these types and has no setting that is unknown here."""
    if part.get("type") not in types:
        raise ValueError(f"its {kind} is a {part.get('type')}, which is not {' or '.join(types)}")
    known = _READ[kind].split()
    odd = {k: v for k, v in part.items() if k not in known and not _TRAINING.fullmatch(k) and v not in (None, False)}
    if odd:
        raise ValueError(f"its {kind} has {odd}, which cannot be expressed here")
    return part


def _need(what: str, given: object, wanted: object) -> None:
    if given != wanted:
        raise ValueError(f"its {what} is {given}, only {wanted} can be expressed here")


def _trunk(model: Mapping[str, Any], start: int) -> dict[str, Any]:
    """Our settings of their backbone and neck, which begins at C2 (`start` 0) or C3."""
    body, neck = _only(model["backbone"], "backbone", "ResNet"), _only(model["neck"], "neck", "FPN")
    _need("backbone.out_indices", tuple(body.get("out_indices", (0, 1, 2, 3))), (0, 1, 2, 3))
    _need("backbone.num_stages", body.get("num_stages", 4), 4)
    norm = (body.get("norm_cfg") or {}).get("type", "BN")
    _need("backbone.norm_cfg.type", "BN" if norm in ("SyncBN", "MMSyncBN", "naiveSyncBN") else norm, "BN")
    _need("neck.start_level", neck.get("start_level", 0), start)
    return {
        "backbone": {"name": "resnet", "variant": f"resnet{body['depth']}", "style": body.get("style", "pytorch")},
        "neck_channels": neck["out_channels"],
        "extra_levels": neck["num_outs"] - (4 - start),
    }


def _anchors(
    head: Mapping[str, Any], strides: Sequence[int], deviations: Sequence[float] = (1, 1, 1, 1)
) -> Mapping[str, Any]:
    """Their anchor generator, if its strides and the coding of boxes are ours."""
    made, coder = head["anchor_generator"], head["bbox_coder"]
    _need("anchor_generator.type", made["type"], "AnchorGenerator")
    _need("anchor_generator.strides", list(made["strides"]), list(strides))
    _need("anchor_generator.center_offset", made.get("center_offset", 0), 0)
    _need("bbox_coder.type", coder["type"], "DeltaXYWHBBoxCoder")
    _need("bbox_coder.target_means", list(coder["target_means"]), [0, 0, 0, 0])
    _need("bbox_coder.target_stds", list(coder["target_stds"]), list(deviations))
    found: Mapping[str, Any] = made
    return found


def _two_stage(model: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of our `faster_rcnn` for a FasterRCNN or MaskRCNN of theirs."""
    first, second = _only(model["rpn_head"], "rpn_head", "RPNHead"), model["roi_head"]
    made = _anchors(first, (4, 8, 16, 32, 64))
    _need("rpn_head.anchor_generator.scales", len(made["scales"]), 1)
    _need("neck.add_extra_convs", bool(model["neck"].get("add_extra_convs", False)), False)
    look = second["bbox_roi_extractor"]
    layer, head = look["roi_layer"], _only(second["bbox_head"], "bbox_head", "Shared2FCBBoxHead")
    _need("roi_layer.type", layer["type"], "RoIAlign")
    _need("featmap_strides", list(look["featmap_strides"]), [4, 8, 16, 32])
    _need("bbox_head.reg_class_agnostic", head.get("reg_class_agnostic", False), False)
    _need("bbox_head.bbox_coder.target_stds", list(head["bbox_coder"]["target_stds"]), [0.1, 0.1, 0.2, 0.2])
    return {
        **_trunk(model, 0),
        "anchor_grid": "exact",
        "anchor_scale": made["scales"][0],
        "aspect_ratios": tuple(made["ratios"]),
        "roi_head.resolution": layer["output_size"],
        "roi_head.sampling_ratio": layer.get("sampling_ratio", 0),
        "roi_head.aligned": layer.get("aligned", True),
        "roi_head.finest_scale": look.get("finest_scale", 56),
        "roi_head.hidden": head["fc_out_channels"],
    }


def _retinanet(model: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of our `retinanet` for theirs."""
    head, neck = _only(model["bbox_head"], "bbox_head", "RetinaHead"), model["neck"]
    made = _anchors(head, (8, 16, 32, 64, 128))
    _need("neck.add_extra_convs", {True: "on_input"}.get(neck["add_extra_convs"], neck["add_extra_convs"]), "on_input")
    return {
        **_trunk(model, 1),
        "extra_relu": neck.get("relu_before_extra_convs", False),
        "head_convs": head.get("stacked_convs", 4),
        "tower_channels": head.get("feat_channels", 256),
        "head_kind": "plain",
        "head_norm": "none",
        "anchor_grid": "exact",
        "anchor_scale": made["octave_base_scale"],
        "anchor_octaves": made["scales_per_octave"],
        "aspect_ratios": tuple(made["ratios"]),
    }


def _fcos(model: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of our `fcos` for theirs."""
    head, neck = _only(model["bbox_head"], "bbox_head", "FCOSHead"), model["neck"]
    _need("bbox_head.strides", list(head.get("strides", ())), [8, 16, 32, 64, 128])
    _need("neck.add_extra_convs", neck["add_extra_convs"], "on_output")
    _need("neck.relu_before_extra_convs", neck.get("relu_before_extra_convs", False), True)
    return {
        **_trunk(model, 1),
        "head_convs": head.get("stacked_convs", 4),
        "tower_channels": head.get("feat_channels", 256),
        "head_kind": "plain",
        "head_norm": "group",
        "points": "centre",
        "level_scales": True,
        "distance": "relu" if head.get("norm_on_bbox") else "exp",
        "centerness_tower": "box" if head.get("centerness_on_reg") else "class",
    }


_KINDS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "FasterRCNN": _two_stage,
    "MaskRCNN": _two_stage,
    "RetinaNet": _retinanet,
    "FCOS": _fcos,
}
