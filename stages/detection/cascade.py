"""A cascade of RoI heads (arXiv 1712.00726): each looks at the boxes that the one before it refined, and asks for more
overlap with the object.

    RoIs --head 1--> refined boxes (detached) --sampled with the ground truth--> RoIs --head 2--> ...

The rules are those of mmdet 2.20 (mmdet/models/roi_heads/cascade_roi_head.py), with which HEAD's cascade teacher was
trained. The heads are given to each function: a teacher's and its assistant's run by the same rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import clip_boxes_to_image

from stages.detection.proposals import SamplingSettings, sample_rois, unlabelled_rois
from stages.detection.records import Proposals, RoIs, RoIStage, Targets
from stages.detection.roi_head import RoIHead


@torch.no_grad()
def refine(head: RoIHead, stage: RoIStage, sizes: Sequence[tuple[int, int]]) -> tuple[Proposals, ...]:
    """The boxes of a run of `head` as proposals of each image, clipped to its `sizes` (height, width), in the order of the
    RoIs: of the true class where a RoI has one, else of the best.

    Ground truth among the RoIs (its `source` is -1) is left out, as sampling adds it again.
    """
    boxes_MK4, scores_MK = head.decode(stage.activations, stage.rois)
    best, label_M = scores_MK.max(1)
    label_M = torch.where(stage.rois.labels_M >= 0, stage.rois.labels_M, label_M)
    boxes_M4 = boxes_MK4[torch.arange(len(label_M), device=label_M.device), label_M]
    found = []
    for image, size in enumerate(sizes):
        rows = torch.where((stage.rois.image_M == image) & (stage.rois.source_M >= 0))[0]
        found.append(Proposals(clip_boxes_to_image(boxes_M4[rows], size), best[rows], stage.rois.source_M[rows]))
    return tuple(found)


@dataclass(frozen=True)
class Cascade:
    """What binds the stages: how the RoIs of each are sampled, how much its losses weigh, and up to which error (in scaled
    deltas) the box loss is quadratic."""

    samplings: tuple[SamplingSettings, ...]
    weights: tuple[float, ...]
    beta: float

    def run(
        self,
        heads: Sequence[RoIHead],
        levels: tuple[Tensor, ...],
        rois: RoIs,
        sizes: Sequence[tuple[int, int]],
        targets: Targets | None = None,
    ) -> tuple[RoIStage, ...]:
        """All stages on the level maps, the first on `rois`; with `targets` each later one on a sample of the refined boxes
        and the ground truth, without on all refined boxes. No gradient flows through boxes."""
        stages = [RoIStage(rois, heads[0](levels, rois))]
        for before, head, sampling in zip(heads[:-1], heads[1:], self.samplings[1:], strict=True):
            found = refine(before, stages[-1], sizes)
            rois = unlabelled_rois(found) if targets is None else sample_rois(found, targets, sampling)
            stages.append(RoIStage(rois, head(levels, rois)))
        return tuple(stages)

    def loss(self, heads: Sequence[RoIHead], stages: Sequence[RoIStage]) -> dict[str, Tensor]:
        """Weighted `cls_1`, `box_1`, `cls_2` ...: each head's losses on the RoIs that it looked at."""
        losses: dict[str, Tensor] = {}
        for number, (head, stage, weight) in enumerate(zip(heads, stages, self.weights, strict=True), 1):
            own = head.loss(stage.activations, stage.rois, self.beta)
            losses |= {f"{name}_{number}": weight * loss for name, loss in own.items()}
        return losses

    def decode(self, heads: Sequence[RoIHead], stages: Sequence[RoIStage]) -> tuple[Tensor, Tensor]:
        """Boxes (M, K, 4) in pixels of the last stage, and probabilities (M, K) averaged over the stages (as detectron2 does;
        mmdet averages logits).

        Raises ValueError for a run with targets: its stages were sampled anew, and hold ground truth.
        """
        first = stages[0].rois.source_M
        if (first < 0).any() or not all(torch.equal(first, stage.rois.source_M) for stage in stages[1:]):
            raise ValueError(
                "cascade: the stages looked at RoIs sampled with targets; decode what was predicted without"
            )
        decoded = [head.decode(stage.activations, stage.rois) for head, stage in zip(heads, stages, strict=True)]
        return decoded[-1][0], torch.stack([scores for _, scores in decoded]).mean(0)
