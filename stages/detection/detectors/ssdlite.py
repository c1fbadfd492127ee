"""SSDLite with MobileNetV3 (arXiv 1801.04381, section 6.2; 1905.02244, section 6.3) from torchvision's blocks.

Its levels are the backbone's own maps and four extra ones, each of its own width: there is no neck. Classes compete with the
background in a softmax; predictions hold each class's log-odds, whose sigmoid is its probability, as for every dense
detector. Its backbone's stages are at strides 4, 8, 16 and 32, its levels at 16 to 512.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.detection._utils import BoxCoder, SSDMatcher
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.ssd import SSDScoringHead
from torchvision.models.detection.ssdlite import SSDLiteHead, _mobilenet_extractor, _normal_init
from torchvision.models.mobilenetv3 import MobileNetV3, _mobilenet_v3_conf
from torchvision.ops import box_iou

from pipeline.config import BaseConfig
from stages.detection.dense_head import by_anchor
from stages.detection.detector import DenseDetector
from stages.detection.precision import at_least_single
from stages.detection.published import listed
from stages.detection.records import (
    Anchors,
    DensePredictions,
    Features,
    Targets,
)
from stages.detection.torchvision_weights import class_rows, select_rows

LEVELS = 6


class DefaultBoxes(nn.Module):
    """SSD's anchors: their sizes are shares of the canvas, six a cell."""

    def __init__(self, smallest: float, largest: float) -> None:
        super().__init__()
        self.generator = DefaultBoxGenerator([[2, 3]] * LEVELS, min_ratio=smallest, max_ratio=largest)
        self.per_cell: int = self.generator.num_anchors_per_location()[0]
        self._made: dict[object, Anchors] = {}  # one canvas is used a million times

    def forward(self, levels: tuple[Tensor, ...], size: tuple[int, int]) -> Anchors:
        """Anchors for these level maps of a canvas of `size` (height, width), on the maps' device, float32 or better."""
        shapes = tuple((level.shape[-2], level.shape[-1]) for level in levels)
        dtype = torch.promote_types(levels[0].dtype, torch.float32)
        key = (shapes, size, levels[0].device, dtype)
        if key not in self._made:
            canvas = ImageList(torch.empty((1, 3, *size), device="meta"), [size])
            one = torch.empty((1, 1, 1, 1), device=levels[0].device, dtype=dtype)
            (boxes,) = self.generator(canvas, [one.expand(1, 1, *shape) for shape in shapes])
            self._made = {key: Anchors(boxes, shapes, self.per_cell)}
        return self._made[key]


def log_odds(logits_BAJ: Tensor) -> Tensor:
    """Logits of a softmax to numbers whose sigmoids are its probabilities."""
    chances = at_least_single(logits_BAJ).log_softmax(-1)
    # A probability that rounds to 1 has odds without bound; the largest number below 1 stands for it.
    certain = -torch.finfo(chances.dtype).eps
    return chances - (-torch.expm1(chances.clamp(max=certain))).log()


class SSDLite(DenseDetector):
    """With equal weights it equals torchvision's `ssdlite320_mobilenet_v3_large`, on any canvas."""

    class Config(BaseConfig):
        width: float = Field(default=1.0, gt=0)
        """Channels of the backbone, as a multiple of MobileNetV3-Large's."""
        reduced_tail: bool = True
        """Half of the channels after C4, as the published detector has; false for weights of ImageNet."""
        trainable_layers: int = Field(default=6, ge=0, le=6)
        """How many of the backbone's six parts learn, from the last."""
        smallest: float = Field(default=0.2, gt=0, lt=1)
        """Side of the finest level's anchors, as a share of the canvas's."""
        largest: float = Field(default=0.95, gt=0, lt=1)
        """Side of the coarsest level's anchors."""
        negatives: float = Field(default=3.0, gt=0)
        """Anchors on background that count in the loss for each on an object: those with the highest loss."""

    head: SSDLiteHead
    tower_channels = None

    def __init__(self, config: SSDLite.Config, classes: int) -> None:
        super().__init__((127.5,) * 3, (127.5,) * 3)  # to [-1, 1]
        self.config = config
        self.classes = classes
        norm = partial(nn.BatchNorm2d, eps=0.001, momentum=0.03)
        settings, last = _mobilenet_v3_conf(
            "mobilenet_v3_large", width_mult=config.width, reduced_tail=config.reduced_tail
        )
        network = MobileNetV3(settings, last, norm_layer=norm)
        _normal_init(network)
        strided = [number for number, part in enumerate(network.features) if getattr(part, "_is_cn", False)]
        self._ends = tuple(number - 1 for number in strided[1:3])  # of the stages at strides 4 and 8
        self.backbone = _mobilenet_extractor(network, config.trainable_layers, norm)
        self.strides = tuple(16 * 2**level for level in range(LEVELS))
        maps = [*self.backbone.features, *self.backbone.extra]
        self.channels = tuple(part[-1].out_channels for part in maps)
        self.anchors = DefaultBoxes(config.smallest, config.largest)
        self.per_cell = self.anchors.per_cell
        self.head = SSDLiteHead(list(self.channels), [self.per_cell] * LEVELS, classes + 1, norm)
        self.coder = BoxCoder((10.0, 10.0, 5.0, 5.0))
        self.matcher = SSDMatcher(0.5)

    @classmethod
    def build(cls, config: SSDLite.Config, classes: int) -> SSDLite:
        return cls(config, classes)

    def load_backbone(self, state: Mapping[str, Tensor]) -> None:
        """MobileNetV3-Large's, for `reduced_tail: false`; what lies behind its features is left. Raises ValueError naming what
        does not fit."""
        split = len(self.backbone.features[0]) - 1  # the block that levels are read from the middle of

        def theirs(key: str) -> str:
            half, number, rest = key.split(".", 2)
            if (half, number) == ("0", str(split)):
                return f"features.{split}.block.0.{rest}"
            if (half, number) == ("1", "0"):
                return f"features.{split}.block.{rest}"
            return f"features.{int(number) + (split if half == '1' else 0)}.{rest}"

        own = self.backbone.features.state_dict()
        named = {key: state.get(theirs(key)) for key in own}
        missing = [key for key, value in named.items() if value is None or value.shape != own[key].shape]
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(own)} backbone tensors are not in it or have another shape: {listed(missing)}; "
                "torchvision's MobileNetV3-Large fits with reduced_tail: false"
            )
        self.backbone.features.load_state_dict(named)

    def features(self, images_BCHW: Tensor) -> Features:
        x, stages = self.normalise(images_BCHW), []
        for number, part in enumerate(self.backbone.features[0]):
            x = part(x)
            if number in self._ends:
                stages.append(x)
        levels = [x]
        for part in (self.backbone.features[1], *self.backbone.extra):
            x = part(x)
            levels.append(x)
        return Features((*stages, *levels[:2]), tuple(levels), (images_BCHW.shape[-2], images_BCHW.shape[-1]))

    def predict(self, features: Features, targets: Targets | None = None) -> DensePredictions:
        anchors = self.anchors(features.levels, features.size)
        class_tower, logits = outputs(self.head.classification_head, features.levels, self.classes + 1)
        box_tower, deltas = outputs(self.head.regression_head, features.levels, 4)
        odds = log_odds(logits)
        repeated = anchors.boxes_A4.repeat(deltas.shape[0], 1)  # len() would fix the batch of an export
        boxes = self.coder.decode_single(at_least_single(deltas).flatten(0, 1), repeated).view_as(deltas)
        return DensePredictions(
            class_tower, box_tower, odds[..., 1:], deltas, boxes, anchors, background_BA=odds[..., 0]
        )

    def loss(self, predictions: DensePredictions, targets: Targets) -> dict[str, Tensor]:
        """Named `cls`, cross entropy of the anchors on objects and of the hardest on background, and `box`, smooth L1 of the
        deltas; sums over the batch divided by its anchors on objects (torchvision)."""
        anchors, background = predictions.anchors.boxes_A4, predictions.background_BA
        assert background is not None
        odds = torch.cat([background[..., None], predictions.logits_BAK], 2)
        label_BA = torch.zeros_like(background, dtype=torch.int64)
        box = predictions.deltas_BA4.sum() * 0.0  # a batch without objects still has a gradient
        for number, (truth, labels) in enumerate(zip(targets.boxes, targets.labels, strict=True)):
            if not len(truth):
                continue
            match = self.matcher(box_iou(truth, anchors))
            on = torch.where(match >= 0)[0]
            label_BA[number, on] = labels[match[on]] + 1
            encoded = self.coder.encode_single(truth[match[on]], anchors[on])
            deltas = at_least_single(predictions.deltas_BA4)[number, on]
            box = box + functional.smooth_l1_loss(deltas, encoded.to(deltas.dtype), reduction="sum")
        error_BA = -functional.logsigmoid(odds.gather(2, label_BA[..., None])[..., 0])
        object_BA = label_BA > 0
        hardness = error_BA.detach().masked_fill(object_BA, -torch.inf)
        rank = hardness.argsort(1, descending=True).argsort(1)
        hard = (rank < self.config.negatives * object_BA.sum(1, keepdim=True)) & ~object_BA
        count = object_BA.sum().clamp(min=1)
        return {"cls": error_BA[object_BA | hard].sum() / count, "box": box / count}

    def convert(self, state: Mapping[str, Tensor], class_names: Sequence[str]) -> dict[str, Tensor]:
        result = dict(state)
        for level in range(LEVELS):
            for part in ("weight", "bias"):
                key = f"head.classification_head.module_list.{level}.1.{part}"
                outputs = result[key].shape[0] // self.per_cell
                rows = class_rows(outputs, class_names, background=True)
                result[key] = select_rows(result[key], rows, self.per_cell, outputs, 1)
        return result


def outputs(branch: SSDScoringHead, levels: tuple[Tensor, ...], size: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """What a branch of torchvision's head says: the maps behind its depthwise convolutions, and (B, A, `size`)."""
    towers = tuple(block[0](level) for block, level in zip(branch.module_list, levels, strict=True))
    said = [by_anchor(block[1](tower), size) for block, tower in zip(branch.module_list, towers, strict=True)]
    return towers, torch.cat(said, 1)
