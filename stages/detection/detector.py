"""What every detector is: small steps from images to candidates, with typed records between them (`records.py`).

    images_BCHW --features--> Features --predict--> Predictions --loss--> named losses
                                                        |--candidates--> Candidates (before NMS; the exported graph ends here)
                                                        |--proposals---> Proposals  (where to look; what HEAD's assistant reads)

Training, distillation and export each call the steps they need. Nothing depends on `Module.training` but the layers that
must (batch normalisation).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pipeline.config import BaseConfig
from stages.detection.backbone import Backbone
from stages.detection.candidates import by_probability
from stages.detection.proposals import class_agnostic_proposals
from stages.detection.pyramid import IMAGENET_MEAN, IMAGENET_STD, load_body
from stages.detection.records import (
    Candidates,
    DensePredictions,
    Features,
    Proposals,
    ProposalSettings,
    RoIActivations,
    RoIPredictions,
    RoIs,
    Targets,
)
from stages.detection.roi_head import RoIHead


class Detector(nn.Module, ABC):
    """A detector for `classes` classes. Images are RGB in [0, 255]; each detector normalises them itself."""

    class Config(BaseConfig):
        """Each implementation has its own."""

    exportable: ClassVar[bool] = False
    openmmlab: ClassVar[tuple[str, ...]] = ()  # OpenMMLab's detectors whose checkpoints it takes
    students: ClassVar[tuple[Mapping[str, Any], ...]] = ()
    """Settings of sensible students, for training from random weights: `pipeline init` chooses among those of all detectors
    by their operations."""
    config: Any  # as it was built with
    licence: ClassVar[str] = ""  # SPDX identifier, where the detector's code brings one that weights may fall under
    needs_nms: bool = True  # whether candidates still hold duplicates
    head_only: frozenset[str] = frozenset()  # losses of its own that teach its head alone, and are not meant to do more
    done: float = 0.0  # share of the training behind it, for losses that shift with it; the training sets it each step
    classes: int  # background not counted
    strides: tuple[int, ...]  # of the levels, finest first
    channels: tuple[int, ...]  # of the levels

    def __init__(self, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

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

    def unpickle(self, file: Path, class_names: Sequence[str]) -> dict[str, Tensor]:
        """As `convert`, of a file that only unpickling opens, which may run code: called where the user trusts it.

        Raises ValueError where this detector knows no such files, or not this one.
        """
        raise ValueError(f"a {type(self).__name__} has no pickled checkpoints; give a plain state dict")

    @abstractmethod
    def convert(self, state: Mapping[str, Tensor], class_names: Sequence[str]) -> dict[str, Tensor]:
        """A published torchvision state dict as this detector's: classes are matched by name.

        Raises ValueError where a class of ours is not among the checkpoint's.
        """

    def load_backbone(self, state: Mapping[str, Tensor]) -> None:
        """Put a classification checkpoint, or the backbone of a detector's, into the backbone.

        Raises ValueError naming the tensors that the backbone has and the file has not (or in another shape), and where the
        detector prepares its images otherwise than the checkpoint was trained with.
        """
        body = getattr(getattr(self, "backbone", None), "body", None)
        if not isinstance(body, Backbone):
            raise ValueError(f"a {type(self).__name__} has no backbone of its own to load; give `weights`")
        load_body(body, state)
        for name, buffer, wanted in zip(("pixel_mean", "pixel_std"), ("mean", "std"), body.pixels or (), strict=False):
            if not torch.allclose(self.get_buffer(buffer).flatten(), torch.tensor(wanted), atol=1e-3):
                shown = [round(value, 3) for value in wanted]
                raise ValueError(f"it was trained with another {name}; set {name}: {shown}")

    def forward(self, images_BCHW: Tensor, count: int = 1000) -> Candidates:
        """Images to candidates: all steps of inference."""
        return self.candidates(self.predict(self.features(images_BCHW)), count)


class DenseDetector(Detector):
    """A detector whose head speaks of every anchor. `head` holds towers and output convolutions as named modules: a
    `DenseHead`, or one of its own kind where the towers differ from level to level."""

    exportable = True
    head: nn.Module
    per_cell: int  # anchors of a cell
    tower_channels: int | None  # of `class_tower`; None where they differ from level to level
    bins: int = 0  # of the distributions of a box's sides; 0 where sides are regressed directly

    @abstractmethod
    def predict(self, features: Features, targets: Targets | None = None) -> DensePredictions: ...

    def candidates(self, predictions: Any, count: int) -> Candidates:
        """By the best class probability alone, unless the head says more of a box's quality."""
        return by_probability(predictions, count)

    def proposals(
        self, predictions: Any, sizes: Sequence[tuple[int, int]], settings: ProposalSettings
    ) -> tuple[Proposals, ...]:
        """By the best class of each anchor: FCOS's centerness stays out too, as in HEAD's FCOS students."""
        best = predictions.logits_BAK.detach().max(-1).values.sigmoid()
        return class_agnostic_proposals(best, predictions.boxes_BA4.detach(), predictions.anchors, sizes, settings)


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
