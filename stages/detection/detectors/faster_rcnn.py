"""Faster R-CNN with a feature pyramid (arXiv 1506.01497, 1612.03144) from torchvision's blocks: the usual teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead, concat_box_prediction_layers

from pipeline.log import logger
from stages.detection.anchors import AnchorGrid, AnchorKind
from stages.detection.detector import RoIDetector
from stages.detection.precision import at_least_single
from stages.detection.proposals import SamplingSettings, class_agnostic_proposals, sample_rois, unlabelled_rois
from stages.detection.pyramid import PyramidConfig, pyramid, run_pyramid
from stages.detection.records import (
    Candidates,
    Features,
    Proposals,
    ProposalSettings,
    RoIPredictions,
    RoIs,
    RoIStage,
    Targets,
)
from stages.detection.roi_head import RoIHead, RoIHeadConfig
from stages.detection.torchvision_weights import class_rows, select_rows


class FasterRCNN(RoIDetector):
    """With the default settings and equal weights it equals torchvision's `fasterrcnn_resnet50_fpn`, and the boxes of its
    `maskrcnn_resnet50_fpn`, whose mask head is left out."""

    openmmlab: ClassVar[tuple[str, ...]] = ("FasterRCNN", "MaskRCNN")

    class Config(PyramidConfig):
        extra_levels: Literal[0, 1] = 1
        """1 adds P6 by subsampling P5, as torchvision does; it gives proposals and is not pooled from."""
        anchor_scale: float = Field(default=8.0, gt=0)
        """Side of the one anchor of a level, in strides."""
        aspect_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
        """Height over width of the anchors."""
        anchor_grid: AnchorKind = "whole"
        """Anchors in whole pixels, as torchvision's, or exact, as OpenMMLab's."""
        proposals_training: int = Field(default=2000, ge=1)
        """Proposals kept a level before NMS, and an image after it, in training."""
        proposals: int = Field(default=1000, ge=1)
        """The same at inference."""
        rpn_samples: int = Field(default=256, ge=2)
        """Anchors an image on which the first stage learns, half of them positive at most."""
        rois: int = Field(default=512, ge=2)
        """RoIs an image on which the second stage learns, a quarter of them positive at most."""
        roi_head: RoIHeadConfig = RoIHeadConfig()
        """The second stage."""

    def __init__(self, config: FasterRCNN.Config, classes: int) -> None:
        super().__init__(config.pixel_mean, config.pixel_std)
        self.config = config
        self.classes = classes
        self.backbone, self.strides = pyramid(config, 2, config.extra_levels)
        self.channels = (config.neck_channels,) * len(self.strides)
        self.anchors = AnchorGrid(self.strides, config.anchor_scale, 1, config.aspect_ratios, config.anchor_grid)
        head = RPNHead(config.neck_channels, self.anchors.per_cell)
        # Sampling and losses of the first stage are torchvision's; its cut of proposals is not used (ours keeps sources).
        unused = {"training": 0, "testing": 0}
        self.rpn = RegionProposalNetwork(
            self.anchors.generator, head, 0.7, 0.3, config.rpn_samples, 0.5, unused, unused, 0.7
        )
        self.roi_heads = RoIHead(config.roi_head, config.neck_channels, self.strides, classes)
        self.coder = BoxCoder((1.0, 1.0, 1.0, 1.0))

    @classmethod
    def build(cls, config: FasterRCNN.Config, classes: int) -> FasterRCNN:
        return cls(config, classes)

    def features(self, images_BCHW: Tensor) -> Features:
        return run_pyramid(self.backbone, self.normalise(images_BCHW))

    def predict(self, features: Features, targets: Targets | None = None) -> RoIPredictions:
        anchors = self.anchors(features.levels, features.size)
        batch = len(features.levels[0])
        objectness, deltas = concat_box_prediction_layers(*self.rpn.head(list(features.levels)))
        objectness_BA, deltas_BA4 = objectness.view(batch, -1), deltas.view(batch, -1, 4)
        boxes = self.coder.decode_single(at_least_single(deltas.detach()), anchors.boxes_A4.repeat(batch, 1)).view_as(
            deltas_BA4
        )
        count = self.config.proposals if targets is None else self.config.proposals_training
        sizes = [features.size] * batch if targets is None else targets.sizes
        found = class_agnostic_proposals(
            objectness_BA.detach(), boxes, anchors, sizes, ProposalSettings(count, 0.7, count)
        )
        rois = unlabelled_rois(found) if targets is None else sample_rois(found, targets, self.sampling)
        *earlier, last = self.look(features, rois, sizes, targets)
        return RoIPredictions(
            objectness_BA, deltas_BA4, anchors, found, last.rois, last.activations, earlier=tuple(earlier)
        )

    @property
    def sampling(self) -> SamplingSettings:
        """How the RoIs on which the second stage learns are chosen."""
        return SamplingSettings(self.config.rois)

    def look(
        self, features: Features, rois: RoIs, sizes: Sequence[tuple[int, int]], targets: Targets | None
    ) -> tuple[RoIStage, ...]:
        """All runs of RoI heads, beginning with `rois`; `sizes` are those of the real images, to which boxes are clipped."""
        return (RoIStage(rois, self.roi_head(features, rois)),)

    def roi_loss(self, stages: Sequence[RoIStage]) -> dict[str, Tensor]:
        """The losses of the RoI heads, each on its RoIs."""
        return self.roi_heads.loss(stages[-1].activations, stages[-1].rois)

    def decode(self, stages: Sequence[RoIStage]) -> tuple[Tensor, Tensor]:
        """Boxes (M, K, 4) in pixels and probabilities (M, K) of the last RoIs."""
        return self.roi_heads.decode(stages[-1].activations, stages[-1].rois)

    def loss(self, predictions: RoIPredictions, targets: Targets) -> dict[str, Tensor]:
        """torchvision's four losses: `rpn_cls`, `rpn_box`, `cls`, `box`."""
        anchors = [predictions.anchors.boxes_A4] * len(targets.boxes)
        labels, matched = self.rpn.assign_targets_to_anchors(anchors, [{"boxes": boxes} for boxes in targets.boxes])
        wanted = self.coder.encode(matched, anchors)
        objectness, box = self.rpn.compute_loss(
            at_least_single(predictions.objectness_BA).flatten()[:, None],
            at_least_single(predictions.deltas_BA4).flatten(0, 1),
            labels,
            list(wanted),
        )
        return {"rpn_cls": objectness, "rpn_box": box, **self.roi_loss(predictions.stages)}

    def candidates(self, predictions: RoIPredictions, count: int) -> Candidates:
        """Top `count` of an image's (RoI, class) pairs; images with fewer are filled with empty boxes of score 0."""
        boxes_MK4, scores_MK = self.decode(predictions.stages)
        batch = len(predictions.objectness_BA)
        boxes, scores = boxes_MK4.new_zeros(batch, count, 4), scores_MK.new_zeros(batch, count)
        labels = predictions.rois.source_M.new_zeros(batch, count)
        source = torch.full_like(labels, -1)
        for image in range(batch):
            rows = torch.where(predictions.rois.image_M == image)[0]
            best, index = scores_MK[rows].flatten().topk(min(count, len(rows) * self.classes))
            roi = rows[torch.div(index, self.classes, rounding_mode="floor")]
            n = len(best)
            scores[image, :n], labels[image, :n] = best, index % self.classes
            boxes[image, :n] = boxes_MK4[roi, index % self.classes]
            source[image, :n] = predictions.rois.source_M[roi]
        return Candidates(boxes, scores, labels, source)

    def proposals(
        self, predictions: RoIPredictions, sizes: Sequence[tuple[int, int]], settings: ProposalSettings
    ) -> tuple[Proposals, ...]:
        batch = len(predictions.objectness_BA)
        flat = at_least_single(predictions.deltas_BA4.detach()).flatten(0, 1)
        boxes = self.coder.decode_single(flat, predictions.anchors.boxes_A4.repeat(batch, 1))
        return class_agnostic_proposals(
            predictions.objectness_BA.detach().sigmoid(),
            boxes.view_as(predictions.deltas_BA4),
            predictions.anchors,
            sizes,
            settings,
        )

    def convert(self, state: Mapping[str, Tensor], class_names: Sequence[str]) -> dict[str, Tensor]:
        result = {key: value for key, value in state.items() if not key.startswith("roi_heads.mask_")}
        if dropped := len(state) - len(result):
            logger.info("weights: %d tensors of the mask head are left out; boxes are all that is read", dropped)
        outputs = result["roi_heads.box_predictor.cls_score.bias"].shape[0]
        rows = class_rows(outputs, class_names, background=True)
        for part in ("weight", "bias"):
            for layer, each in (("cls_score", 1), ("bbox_pred", 4)):
                key = f"roi_heads.box_predictor.{layer}.{part}"
                result[key] = select_rows(result[key], rows, 1, outputs, each)
        return result
