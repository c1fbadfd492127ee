"""YOLO as Ultralytics builds it (v8, v10, 11, 26 and their kin), an extra under AGPL-3.0: teacher or student.

    images / 255 -> body -> levels of unequal widths -> box and class towers of each level --> one-to-many: NMS follows
                                                    '-> a second set of them, where there is --> one-to-one: none needed

With equal weights it equals Ultralytics' own forward pass, and its loss Ultralytics' own. A cell is an anchor here, and
its point lies in its middle. The towers end in SiLU, where others end in ReLU.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.config import BaseConfig
from pipeline.errors import UserError
from stages.detection.anchors import AnchorGrid
from stages.detection.detector import DenseDetector
from stages.detection.points import CODER
from stages.detection.precision import at_least_single
from stages.detection.records import (
    Anchors,
    Candidates,
    DensePredictions,
    Features,
    Targets,
)
from stages.detection.torchvision_weights import COCO_NAMES
from stages.detection.ultralytics_network import LICENCE, Criterion, criterion, network, unpickled

COCO = tuple(name for name in COCO_NAMES if name not in ("__background__", "N/A"))


@dataclass(frozen=True)
class YOLOPredictions(DensePredictions):
    """`bins_BAS` holds the logits of the distances' distributions, side after side (the distances themselves where there
    is one bin); `one_to_one` what the second branch says, where there is one. Distances (`deltas_BA4`) are in strides."""

    bins_BAS: Tensor | None = None
    one_to_one: YOLOPredictions | None = None


class CellGrid(AnchorGrid):
    """One anchor a cell: the cell itself."""

    def __init__(self, strides: tuple[int, ...]) -> None:
        super().__init__(strides, 1.0, 1, (1.0,))
        self._moved: tuple[Anchors, Anchors] | None = None

    def forward(self, levels: tuple[Tensor, ...], size: tuple[int, int]) -> Anchors:
        """torchvision's lie around the corners of cells; these around their middles."""
        found = super().forward(levels, size)
        if self._moved is None or self._moved[0] is not found:
            half = (found.boxes_A4[:, 2:] - found.boxes_A4[:, :2]) / 2
            self._moved = found, replace(found, boxes_A4=found.boxes_A4 + half.repeat(1, 2))
        return self._moved[1]


class YOLO(DenseDetector):
    """A YOLO of Ultralytics, under AGPL-3.0: `body` are its layers but the last, `head` is its Detect."""

    licence = LICENCE

    class Config(BaseConfig):
        model: str = "yolo11n"
        """Name of a detection network of the installed ultralytics, scale included: yolov8n, yolo11s, yolo26n."""
        branch: Literal["one_to_many", "one_to_one"] | None = None
        """Whose boxes count: the one-to-many head's, with NMS after it, or the one-to-one head's, without; one-to-one if
        not given and the network has it (v10, 26)."""
        made_for: int | None = Field(default=None, ge=1)
        """Classes by which the head's width is chosen, as many as there are if not given; 80 for weights trained on COCO."""
        box: float = Field(default=7.5, ge=0)
        """Weight of the boxes' CIoU loss."""
        cls: float = Field(default=0.5, ge=0)
        """Weight of the classes' cross entropy."""
        dfl: float = Field(default=1.5, ge=0)
        """Weight of the distances' distributions, or of their L1 where there is one bin (26)."""
        one_to_many: tuple[float, float] = (0.8, 0.1)
        """Share of the one-to-many head in the loss at the begin and the end of the training, linear between; the rest is
        the one-to-one head's. 1 where there is only one."""

    def __init__(self, config: YOLO.Config, classes: int) -> None:
        super().__init__()
        self.config, self.classes = config, classes
        made = network(config.model, classes, config.made_for or classes)
        self.body = nn.ModuleList(made.layers[:-1])
        self.head = made.layers[-1]
        self.sources, self.strides, self.bins = made.sources, made.strides, made.bins
        self.register_buffer("bins_S", torch.arange(made.bins, dtype=torch.float32), persistent=False)
        self.backbone_stages, self.channels = self._shapes(made.backbone)
        self.tower_channels = self.head.get_parameter("cv3.0.2.weight").shape[1]
        self.anchors, self.per_cell = CellGrid(self.strides), 1
        self.paired = getattr(self.head, "one2one_cv2", None) is not None
        if config.branch == "one_to_one" and not self.paired:
            raise UserError(f"detector yolo: {config.model} has no one-to-one head; set branch: one_to_many")
        self.branch = config.branch or ("one_to_one" if self.paired else "one_to_many")
        self.needs_nms = self.branch == "one_to_many"
        if self.paired:
            self.head_only = frozenset(f"one_to_one_{name}" for name in self._parts)
        self._criteria: dict[tuple[bool, torch.device], Criterion] = {}

    @classmethod
    def build(cls, config: YOLO.Config, classes: int) -> YOLO:
        return cls(config, classes)

    def normalise(self, images_BCHW: Tensor) -> Tensor:
        """To [0, 1], with no mean taken away."""
        return images_BCHW.to(self.get_buffer("std").dtype) / 255

    def features(self, images_BCHW: Tensor) -> Features:
        """The last map of each stride from 4 on within the backbone, and the maps that the head reads. Raises UserError
        where the canvas is no multiple of the coarsest stride."""
        size = (images_BCHW.shape[-2], images_BCHW.shape[-1])
        if size[0] % self.strides[-1] or size[1] % self.strides[-1]:
            raise UserError(
                f"detector yolo: height and width must be multiples of {self.strides[-1]}, given {size[0]} x {size[1]}; "
                "set the dataset's size so"
            )
        maps = self._run(self.normalise(images_BCHW))
        levels = tuple(maps[layer] for layer in self.sources[-1])
        return Features(tuple(maps[layer] for layer in self.backbone_stages), levels, size)

    def _run(self, x_BCHW: Tensor) -> list[Tensor]:
        """The maps of all layers of the body."""
        maps: list[Tensor] = []
        for layer, sources in zip(self.body, self.sources, strict=False):
            read = [maps[source] if maps else x_BCHW for source in sources]
            maps.append(layer(read[0] if len(read) == 1 else read))
        return maps

    @torch.no_grad()
    def _shapes(self, backbone: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The last layer of each stride within the backbone, from 4 on, and the channels of the levels."""
        training, side = self.body.training, 2 * self.strides[-1]
        self.body.eval()
        maps = self._run(torch.zeros(1, 3, side, side, device=next(self.body.parameters()).device))
        self.body.train(training)
        last = {side // one.shape[-1]: layer for layer, one in enumerate(maps[:backbone])}
        stages = tuple(layer for stride, layer in sorted(last.items()) if stride >= 4)
        return stages, tuple(maps[layer].shape[1] for layer in self.sources[-1])

    def predict(self, features: Features, targets: Targets | None = None) -> YOLOPredictions:
        """Both heads, where there are two; the one-to-one head teaches the body nothing."""
        many = self._speak(features.levels, features.size, "")
        if not self.paired:
            return many
        return replace(many, one_to_one=self._one_to_one(features))

    def _one_to_one(self, features: Features) -> YOLOPredictions:
        levels = tuple(level.detach() for level in features.levels)
        return self._speak(levels, features.size, "one2one_")

    def _speak(
        self, levels: tuple[Tensor, ...], size: tuple[int, int], prefix: Literal["", "one2one_"]
    ) -> YOLOPredictions:
        """What the branch whose modules' names begin with `prefix` says of each cell."""
        box_tower, bins = _branch(levels, getattr(self.head, f"{prefix}cv2"))
        class_tower, logits = _branch(levels, getattr(self.head, f"{prefix}cv3"))
        anchors = self.anchors(levels, size)
        distances = bins
        if self.bins > 1:  # the mean of each side's distribution (arXiv 2006.04388)
            split = at_least_single(bins).view(*bins.shape[:2], 4, self.bins)
            distances = (split.softmax(-1) * self.get_buffer("bins_S")).sum(-1)
        decoded = CODER.decode(at_least_single(distances), anchors.boxes_A4)
        return YOLOPredictions(class_tower, box_tower, logits, distances, decoded, anchors, bins_BAS=bins)

    def loss(self, predictions: YOLOPredictions, targets: Targets) -> dict[str, Tensor]:
        """Ultralytics' `box`, `cls` and `dfl` (`l1` with one bin), not multiplied by the number of images as it does; of a
        network with two heads also those of the one-to-one head, each head's times its share."""
        if predictions.one_to_one is None:
            return self._losses(predictions, targets, False)
        begin, end = self.config.one_to_many
        share = begin + self.done * (end - begin)
        many = self._losses(predictions, targets, False)
        one = self._losses(predictions.one_to_one, targets, True)
        return {name: share * loss for name, loss in many.items()} | {
            f"one_to_one_{name}": (1 - share) * loss for name, loss in one.items()
        }

    def _losses(self, predictions: YOLOPredictions, targets: Targets, one_to_one: bool) -> dict[str, Tensor]:
        assert predictions.bins_BAS is not None
        logits, shapes = at_least_single(predictions.logits_BAK), predictions.anchors.shapes
        key = (one_to_one, logits.device)
        if key not in self._criteria:
            gains = {"box": self.config.box, "cls": self.config.cls, "dfl": self.config.dfl}
            self._criteria[key] = criterion(self.classes, self.bins, self.strides, gains, one_to_one, logits.device)
        said = {
            "boxes": at_least_single(predictions.bins_BAS).transpose(1, 2),
            "scores": logits.transpose(1, 2),
            "feats": [logits.new_empty(1, 1, rows, columns) for rows, columns in shapes],  # read for their sizes
        }
        parts = self._criteria[key](said, self._batch(targets, shapes[0], logits))[0] / len(logits)
        return dict(zip(self._parts, parts.unbind(), strict=True))

    @property
    def _parts(self) -> tuple[str, str, str]:
        """Names of the losses of a head."""
        return "box", "cls", "dfl" if self.bins > 1 else "l1"

    def _batch(self, targets: Targets, finest: tuple[int, int], like: Tensor) -> dict[str, Tensor]:
        """Targets as Ultralytics' loader gives them: image, label, and centre, width and height as shares of the canvas."""
        rows, columns = (self.strides[0] * cells for cells in finest)
        boxes = torch.cat([one.to(like) for one in targets.boxes])
        centred = torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], 1)
        image = torch.cat([torch.full_like(one, number) for number, one in enumerate(targets.labels)])
        shares = centred / like.new_tensor([columns, rows, columns, rows])
        return {"batch_idx": image.to(like), "cls": torch.cat(list(targets.labels)).to(like), "bboxes": shares}

    def candidates(self, predictions: YOLOPredictions, count: int) -> Candidates:
        """Top `count` of all (cell, class) pairs of the branch that counts, by logit."""
        counted = predictions
        if self.branch == "one_to_one" and predictions.one_to_one is not None:
            counted = predictions.one_to_one
        flat = counted.logits_BAK.flatten(1)
        scores, index = flat.topk(min(count, flat.shape[1]), dim=1)
        cell = torch.div(index, self.classes, rounding_mode="floor")
        boxes = counted.boxes_BA4.gather(1, cell[..., None].expand(-1, -1, 4))
        return Candidates(boxes, at_least_single(scores).sigmoid(), index % self.classes, cell)

    def forward(self, images_BCHW: Tensor, count: int = 1000) -> Candidates:
        """Images to candidates: of two heads, only that which counts."""
        features = self.features(images_BCHW)
        if self.branch == "one_to_one":
            return self.candidates(self._one_to_one(features), count)
        return self.candidates(self._speak(features.levels, features.size, ""), count)

    def convert(self, state: Mapping[str, Tensor], class_names: Sequence[str]) -> dict[str, Tensor]:
        """Ultralytics' state dict (`model.N...`). It does not name its classes: 80 are COCO's, any other number must be
        ours; raises ValueError where that cannot be."""
        return self._renamed(state, class_names, None)

    def unpickle(self, file: Path, class_names: Sequence[str]) -> dict[str, Tensor]:
        state, names = unpickled(file)
        return self._renamed(state, class_names, names)

    def _renamed(
        self, state: Mapping[str, Tensor], class_names: Sequence[str], known: Sequence[str] | None
    ) -> dict[str, Tensor]:
        result, last = {}, str(len(self.body))
        for key, value in state.items():
            layer, _, rest = key.removeprefix("model.").partition(".")
            if not rest.startswith("dfl."):  # constants
                result[f"head.{rest}" if layer == last else f"body.{layer}.{rest}"] = value
        rows = _rows(result, class_names, known)
        for key in [key for key in result if re.fullmatch(r"head\.(one2one_)?cv3\.\d\.2\.(weight|bias)", key)]:
            if result[key].ndim > 1 and result[key].shape[1] != self.tower_channels:
                raise ValueError(
                    f"its class towers are {result[key].shape[1]} wide, ours {self.tower_channels}; set made_for: "
                    f"{len(result[key])}, the classes that its head was made for"
                )
            result[key] = result[key] if rows is None else result[key][rows]
        return result


def _rows(state: Mapping[str, Tensor], ours: Sequence[str], known: Sequence[str] | None) -> list[int] | None:
    """Which of a checkpoint's classes are ours, by name; None where nobody names them and they are as many as ours."""
    outputs = len(state.get("head.cv3.0.2.bias", ()))
    names = known or (COCO if outputs == len(COCO) else None)
    if names is None:
        if outputs != len(ours):
            raise ValueError(f"it has {outputs} classes that nobody names, the dataset {len(ours)}; train")
        return None
    foreign = [name for name in ours if name not in names]
    if foreign:
        raise ValueError(f"it knows the classes {list(names[:5])} (first five), not {foreign[:3]}; train")
    return [list(names).index(name) for name in ours]


def _branch(levels: tuple[Tensor, ...], stacks: nn.ModuleList) -> tuple[tuple[Tensor, ...], Tensor]:
    """A stack of three for each level: the maps before its last convolution, and that one's results (B, A, channels)."""
    towers, outputs = [], []
    for level, stack in zip(levels, stacks, strict=True):
        first, second, last = stack.children()
        tower = second(first(level))
        towers.append(tower)
        outputs.append(last(tower).flatten(2).transpose(1, 2))
    return tuple(towers), torch.cat(outputs, 1)
