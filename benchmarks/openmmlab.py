"""Do our detectors compute what OpenMMLab's compute, with equal random weights?

    pip install mmdet mmengine mmcv-lite       (in an environment of its own, beside headstart[train])
    python benchmarks/openmmlab.py [--only retinanet]

Builds models from the configs that mmdet carries, gives them random weights and statistics, saves them as its runner does,
loads the file into our detector by the documented settings, and prints the largest difference of levels, predictions and
boxes (pixels) on one random image, in double precision: random heads give near ties and boxes of thousands of pixels.
mmcv's compiled operations are not needed: RoIAlign and NMS are torchvision's here.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor

from stages.detection.load import build_detector, load_published
from stages.detection.records import DensePredictions, RoIs

SIZE = (224, 288)
CAFFE = {"backbone": {"name": "resnet50", "style": "caffe"}, "pixel_std": [1, 1, 1]}
ALIGNED = {"anchor_grid": "exact", "roi_head": {"sampling_ratio": 0, "aligned": True}}
DENSE = {"name": "retinanet", "anchor_grid": "exact", "extra_relu": False}
POINTS = {"name": "fcos", "points": "centre", "level_scales": True}
CASES: dict[str, dict[str, Any]] = {
    "retinanet/retinanet_r18_fpn_1x_coco.py": {**DENSE, "backbone": "resnet18"},
    "retinanet/retinanet_r50-caffe_fpn_1x_coco.py": {**DENSE, **CAFFE},
    "faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py": {"name": "faster_rcnn", **ALIGNED},
    "mask_rcnn/mask-rcnn_r101_fpn_1x_coco.py": {"name": "faster_rcnn", "backbone": "resnet101", **ALIGNED},
    "fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py": {
        **POINTS,
        **CAFFE,
        "pixel_mean": [122.7717, 115.9465, 102.9801],
        "distance": "exp",
        "centerness_tower": "class",
    },
    "fcos/fcos_r50-caffe_fpn_gn-head-center-normbbox-centeronreg-giou_1x_coco.py": {**POINTS, **CAFFE},
}


class RoIAlign(torch.nn.Module):
    """torchvision's under mmcv's signature."""

    def __init__(
        self, output_size: int, spatial_scale: float = 1.0, sampling_ratio: int = 0, aligned: bool = True
    ) -> None:
        super().__init__()
        self.output_size, self.spatial_scale = (output_size, output_size), spatial_scale
        self.sampling_ratio, self.aligned = sampling_ratio or -1, aligned

    def forward(self, map_BCHW: Tensor, rois_M5: Tensor) -> Tensor:
        found: Tensor = torchvision.ops.roi_align(
            map_BCHW, rois_M5, self.output_size, self.spatial_scale, self.sampling_ratio, self.aligned
        )
        return found


def batched_nms(boxes: Tensor, scores: Tensor, ids: Tensor, settings: Any, *_: object) -> tuple[Tensor, Tensor]:
    """torchvision's under mmcv's signature."""
    kept = torchvision.ops.batched_nms(boxes, scores, ids, settings["iou_threshold"])
    return torch.cat([boxes[kept], scores[kept][:, None]], 1), kept


def without_compiled_operations() -> None:
    """Let mmdet import mmcv-lite: what it asks of `mmcv.ops` is an empty module, but for the two above."""
    import mmcv

    def asked(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return {"RoIAlign": RoIAlign, "batched_nms": batched_nms}.get(name) or type(name, (torch.nn.Module,), {})

    mmcv.__version__ = "2.1.0"  # mmdet 3.3.0 refuses 2.2.0, the oldest mmcv-lite for new Pythons
    inside = (
        "carafe",
        "deform_conv",
        "merge_cells",
        "modulated_deform_conv",
        "multi_scale_deform_attn",
        "nms",
        "roi_align",
    )
    for name in ("ops", *(f"ops.{one}" for one in inside)):
        made = types.ModuleType(f"mmcv.{name}")
        made.__getattr__ = asked  # type: ignore[method-assign]
        made.__path__ = []  # a package, to whoever imports from it
        sys.modules[made.__name__] = made
    mmcv.ops = sys.modules["mmcv.ops"]


@torch.no_grad()
def theirs(config: Any, images_BCHW: Tensor, file: Path) -> dict[str, Any]:
    """Build the model, save it as a checkpoint, and say what it computes of RGB images."""
    from mmdet.datasets import CocoDataset
    from mmdet.registry import MODELS
    from mmdet.structures import DetDataSample
    from mmdet.structures.bbox import bbox2roi

    config.model.backbone.init_cfg = None
    model = MODELS.build(config.model).eval()
    for name, value in model.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 1.5)
        elif value.ndim == 1 and value.is_floating_point():
            value.add_(0.1 * torch.randn_like(value))
        elif name.endswith(("_reg.weight", "cls.weight")):
            value.normal_(0, 0.03)
    classes = tuple(CocoDataset.METAINFO["classes"])
    meta = {"cfg": config.pretty_text, "dataset_meta": {"classes": classes}}
    torch.save({"meta": meta, "state_dict": model.state_dict()}, file)
    model.double()
    prepared = model.data_preprocessor
    order = [0, 1, 2] if config.model.data_preprocessor.bgr_to_rgb else [2, 1, 0]
    levels = model.extract_feat((images_BCHW[:, order].double() - prepared.mean) / prepared.std)
    found: dict[str, Any] = {"levels": levels, "classes": classes}
    if hasattr(model, "rpn_head"):
        sample = DetDataSample(metainfo={"img_shape": SIZE, "ori_shape": SIZE, "scale_factor": (1.0, 1.0)})
        (proposals,) = model.rpn_head.predict(levels, [sample], rescale=False)
        rois = bbox2roi([proposals.bboxes])
        made = model.roi_head._bbox_forward(levels, rois)
        deltas = made["bbox_pred"].view(len(rois), -1, 4)
        coder = model.roi_head.bbox_head.bbox_coder
        boxes = coder.decode(rois[:, 1:].repeat_interleave(deltas.shape[1], 0), deltas.flatten(0, 1)).view_as(deltas)
        return {**found, "proposals": proposals.bboxes, "logits": made["cls_score"], "deltas": deltas, "boxes": boxes}
    head = model.bbox_head
    maps = head(levels)
    flat = [
        torch.cat([one.permute(0, 2, 3, 1).reshape(-1, size) for one in kind])
        for kind, size in zip(maps, (80, 4, 1), strict=False)
    ]
    priors = torch.cat(head.prior_generator.grid_priors([one.shape[-2:] for one in maps[0]], device="cpu"))
    boxes = head.bbox_coder.decode(priors, flat[1])
    return {**found, "logits": flat[0], "boxes": boxes, "quality": flat[2].squeeze(1) if len(flat) > 2 else None}


@torch.no_grad()
def differences(settings: dict[str, Any], images_BCHW: Tensor, wanted: dict[str, Any], file: Path) -> dict[str, float]:
    """The largest absolute differences of our detector's numbers from theirs."""
    detector = build_detector(settings, len(wanted["classes"]))
    load_published(detector, file, wanted["classes"])
    features = detector.double().eval().features(images_BCHW)
    predictions = detector.predict(features)
    pairs = {f"P{number}": pair for number, pair in enumerate(zip(features.levels, wanted["levels"], strict=True))}
    if isinstance(predictions, DensePredictions):
        pairs |= {
            "logits": (predictions.logits_BAK[0], wanted["logits"]),
            "boxes": (predictions.boxes_BA4[0], wanted["boxes"]),
        }
        if wanted["quality"] is not None:
            pairs["centerness"] = (predictions.quality_BA[0], wanted["quality"])
    else:
        rois_M4 = wanted["proposals"]
        zero = torch.zeros(len(rois_M4), dtype=torch.int64)
        rois = RoIs(rois_M4, zero, zero, zero - 1, rois_M4)
        activations = detector.roi_head(features, rois)
        last_first = [80, *range(80)]
        pairs |= {
            "proposals": (predictions.proposals[0].boxes, rois_M4),
            "logits": (activations.logits, wanted["logits"][:, last_first]),
            "deltas": (activations.deltas[:, 1:], wanted["deltas"]),
            "boxes": (detector.roi_heads.decode(activations, rois)[0], wanted["boxes"]),
        }
    return {name: float((one - other).abs().max()) for name, (one, other) in pairs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="configs whose path has this in it")
    chosen = parser.parse_args().only
    without_compiled_operations()
    import mmdet
    from mmdet.utils import register_all_modules
    from mmengine.config import Config

    register_all_modules(init_default_scope=True)
    folder = Path(mmdet.__file__).parent / ".mim" / "configs"
    for name, settings in CASES.items():
        if chosen in name:
            torch.manual_seed(0)
            images = torch.randint(0, 256, (1, 3, *SIZE), dtype=torch.uint8)
            with tempfile.TemporaryDirectory() as scratch:
                file = Path(scratch) / "theirs.pth"
                wanted = theirs(Config.fromfile(folder / name), images, file)
                found = differences(settings, images, wanted, file)
            print(json.dumps({"config": name, "largest_difference": found}), flush=True)


if __name__ == "__main__":
    main()
