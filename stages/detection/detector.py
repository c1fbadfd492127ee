"""What every detector is: small steps from images to candidates, and the typed records that travel between them.

    images_BCHW --features--> Features --predict--> Predictions --loss--> named losses
                                                        |--candidates--> Candidates (before NMS; the exported graph ends here)
                                                        |--proposals---> Proposals  (where to look; what HEAD's assistant reads)

Training, distillation and export each call the steps they need. Nothing depends on `Module.training` but the layers that
must (batch normalisation). Shape letters: B images, C channels, H rows, W columns, A anchors of all levels, K classes,
M RoIs of all images, N candidates of an image. Boxes are xyxy in pixels of the input canvas. Labels are 0-based.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.config import BaseConfig

if TYPE_CHECKING:
    from stages.detection.dense_head import DenseHead
    from stages.detection.roi_head import RoIHead

IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)


class Targets(NamedTuple):  # no dataclass: Fabric walks through what a module is given and refuses frozen ones
    """Ground truth of a batch: `boxes[b]` (n, 4) xyxy, `labels[b]` (n,) int64, `sizes[b]` the (height, width) of the real
    image inside the canvas, to which proposals are clipped."""

    boxes: Sequence[Tensor]
    labels: Sequence[Tensor]
    sizes: Sequence[tuple[int, int]]

    def to(self, device: torch.device) -> Targets:
        """The same on another device."""
        return Targets([b.to(device) for b in self.boxes], [label.to(device) for label in self.labels], self.sizes)


@dataclass(frozen=True)
class Features:
    """`backbone`: BCHW per backbone stage; `levels`: BCHW per neck level, finest first; `size`: (height, width) of the input."""

    backbone: tuple[Tensor, ...]
    levels: tuple[Tensor, ...]
    size: tuple[int, int]


@dataclass(frozen=True)
class Anchors:
    """All anchors of one canvas in the one order used everywhere: level, row, column, anchor (the last fastest)."""

    boxes_A4: Tensor
    shapes: tuple[tuple[int, int], ...]  # (rows, columns) per level
    per_cell: int

    @property
    def per_level(self) -> list[int]:
        return [rows * columns * self.per_cell for rows, columns in self.shapes]


@dataclass(frozen=True)
class DensePredictions:
    """What a dense head says of every anchor; `class_tower` and `box_tower` are BCHW after the last ReLU, per level.

    `quality_BA` is the logit of how well an anchor is placed (FCOS's centerness), None where the head has no such output:
    scores of candidates are discounted by it, proposals are not (as HEAD does).
    """

    class_tower: tuple[Tensor, ...]
    box_tower: tuple[Tensor, ...]
    logits_BAK: Tensor
    deltas_BA4: Tensor
    boxes_BA4: Tensor
    anchors: Anchors
    quality_BA: Tensor | None = None


@dataclass(frozen=True)
class Proposals:
    """Boxes of one image worth a look. `source` is the flat anchor index each came from, -1 where there is none."""

    boxes: Tensor
    scores: Tensor
    source: Tensor


@dataclass(frozen=True)
class RoIs:
    """Regions of a batch, image after image. `labels` is the 0-based class or -1 for background; `source` as in Proposals
    (ground-truth boxes among the RoIs have -1)."""

    boxes_M4: Tensor
    image_M: Tensor
    source_M: Tensor
    labels_M: Tensor
    matched_M4: Tensor


@dataclass(frozen=True)
class RoIActivations:
    """What an RoI head computes of each RoI: `hidden` layers after their ReLU (M, D), `logits` with background first
    (M, 1 + K), `deltas` per class (M, 1 + K, 4), or (M, 1, 4) where the head's boxes are the same for all classes."""

    hidden: tuple[Tensor, ...]
    logits: Tensor
    deltas: Tensor


@dataclass(frozen=True)
class RoIStage:
    """One run of an RoI head: where it looked and what it computed."""

    rois: RoIs
    activations: RoIActivations


@dataclass(frozen=True)
class RoIPredictions:
    """A two-stage detector's predictions: the dense first stage, and the second stage on `rois`. A cascade has several
    runs of RoI heads: `rois` and `activations` are those of the last, `earlier` the others."""

    objectness_BA: Tensor
    deltas_BA4: Tensor
    anchors: Anchors
    proposals: tuple[Proposals, ...]
    rois: RoIs
    activations: RoIActivations
    earlier: tuple[RoIStage, ...] = ()

    @property
    def stages(self) -> tuple[RoIStage, ...]:
        """All runs of RoI heads in their order."""
        return (*self.earlier, RoIStage(self.rois, self.activations))


Predictions = DensePredictions | RoIPredictions


@dataclass(frozen=True)
class Candidates:
    """The N best boxes of each image before NMS, best first: what the exported graph returns (without `source`)."""

    boxes_BN4: Tensor
    scores_BN: Tensor
    labels_BN: Tensor
    source_BN: Tensor


@dataclass(frozen=True)
class ProposalSettings:
    """How many proposals survive: per level before NMS, NMS inside each level, per image after it (arXiv 2207.05345, code)."""

    before_nms: int = 2000
    nms_iou: float = 0.7
    after_nms: int = 1000


def at_least_single(tensor: Tensor) -> Tensor:
    """Half precision to float32, all else as it is: losses and probabilities are computed so."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class Detector(nn.Module, ABC):
    """A detector for `classes` classes. Images are RGB in [0, 255]; each detector normalises them itself."""

    class Config(BaseConfig):
        """Each implementation has its own."""

    exportable: ClassVar[bool] = False
    classes: int  # background not counted
    strides: tuple[int, ...]  # of the levels, finest first
    channels: tuple[int, ...]  # of the levels

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)

    @classmethod
    @abstractmethod
    def build(cls, config: Any, classes: int) -> Detector:
        """A new detector with random weights."""

    def normalise(self, images_BCHW: Tensor) -> Tensor:
        """uint8 or float RGB in [0, 255] to the backbone's range."""
        mean, std = self.get_buffer("mean"), self.get_buffer("std")
        return (images_BCHW.to(mean.dtype) - mean) / std

    @abstractmethod
    def features(self, images_BCHW: Tensor) -> Features:
        """Backbone and neck."""

    @abstractmethod
    def predict(self, features: Features, targets: Targets | None = None) -> Any:
        """The heads. A two-stage detector samples its RoIs with the targets where they are given."""

    @abstractmethod
    def loss(self, predictions: Any, targets: Targets) -> dict[str, Tensor]:
        """The detector's own named losses, each a scalar."""

    @abstractmethod
    def candidates(self, predictions: Any, count: int) -> Candidates:
        """The `count` best boxes of each image, decoded, before NMS."""

    @abstractmethod
    def proposals(
        self, predictions: Any, sizes: Sequence[tuple[int, int]], settings: ProposalSettings
    ) -> tuple[Proposals, ...]:
        """Detached class-agnostic proposals per image, clipped to `sizes`."""

    @abstractmethod
    def convert(self, state: Mapping[str, Tensor], class_names: Sequence[str]) -> dict[str, Tensor]:
        """A published torchvision state dict as this detector's: classes are matched by name.

        Raises ValueError where a class of ours is not among the checkpoint's.
        """

    def forward(self, images_BCHW: Tensor, count: int = 1000) -> Candidates:
        """Images to candidates: all steps of inference."""
        return self.candidates(self.predict(self.features(images_BCHW)), count)


class DenseDetector(Detector):
    """A detector whose head speaks of every anchor; `head` holds towers and output convolutions as named modules."""

    exportable = True
    head: DenseHead
    per_cell: int  # anchors of a cell
    tower_channels: int  # of `class_tower`

    @abstractmethod
    def predict(self, features: Features, targets: Targets | None = None) -> DensePredictions: ...


class RoIDetector(Detector):
    """A two-stage detector; `roi_heads` is its second stage, the first of them in a cascade."""

    roi_heads: RoIHead

    @property
    def stages(self) -> tuple[RoIHead, ...]:
        """The RoI heads in the order in which they look: one, or a cascade."""
        return (self.roi_heads,)

    @abstractmethod
    def predict(self, features: Features, targets: Targets | None = None) -> RoIPredictions: ...

    def roi_head(self, features: Features, rois: RoIs, stage: int = 0) -> RoIActivations:
        """The RoI head `stage` on RoIs that somebody else may have chosen: what HEAD asks of the teacher."""
        activations: RoIActivations = self.stages[stage](features.levels, rois)
        return activations
