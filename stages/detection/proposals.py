"""Proposals from the predictions of a detector, and the RoIs sampled from them.

The rules are those of HEAD's code (arXiv 2207.05345; LutingWang/HEAD head/dense_heads.py, head/samplers.py on mmdet
2.20): the best class counts, a cut per level, NMS inside each level, a cut per image; then positives at IoU 0.5, ground
truth added to the pool, a random sample with at most a quarter of positives. Everything is detached.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image

from stages.detection.records import Anchors, Proposals, ProposalSettings, RoIs, Targets


@dataclass(frozen=True)
class SamplingSettings:
    """`count` RoIs an image, at most `positive_fraction` of them overlapping an object by `iou` or more."""

    count: int = 512
    positive_fraction: float = 0.25
    iou: float = 0.5


@torch.no_grad()
def class_agnostic_proposals(
    scores_BA: Tensor,
    boxes_BA4: Tensor,
    anchors: Anchors,
    sizes: Sequence[tuple[int, int]],
    settings: ProposalSettings,
) -> tuple[Proposals, ...]:
    """The best boxes of each image, best first, clipped to its `sizes` (height, width); empty boxes are dropped.

    `scores_BA` may be logits or probabilities: only their order counts here, and they are returned as given.
    """
    starts = [0]
    for count in anchors.per_level:
        starts.append(starts[-1] + count)
    kept, levels = [], []
    for number, (begin, end) in enumerate(pairwise(starts)):
        top = scores_BA[:, begin:end].topk(min(settings.before_nms, end - begin), dim=1).indices + begin
        kept.append(top)
        levels.append(torch.full_like(top[0], number))
    source_BN, level_N = torch.cat(kept, 1), torch.cat(levels)
    result = []
    for scores_A, boxes_A4, source, size in zip(scores_BA, boxes_BA4, source_BN, sizes, strict=True):
        boxes, scores = clip_boxes_to_image(boxes_A4[source], size), scores_A[source]
        whole = ((boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])).nonzero()[:, 0]
        boxes, scores, source, level = boxes[whole], scores[whole], source[whole], level_N[whole]
        best = batched_nms(boxes, scores, level, settings.nms_iou)[: settings.after_nms]
        result.append(Proposals(boxes[best].detach(), scores[best].detach(), source[best]))
    return tuple(result)


@torch.no_grad()
def sample_rois(proposals: Sequence[Proposals], targets: Targets, settings: SamplingSettings) -> RoIs:
    """Ground truth plus proposals, matched by best IoU and sampled; `source_M` is -1 on ground-truth rows.

    An image without objects gives background RoIs only. Within an image the order is that of the pool: ground truth
    first, then proposals.
    """
    sampler = BalancedPositiveNegativeSampler(settings.count, settings.positive_fraction)
    parts: list[tuple[Tensor, ...]] = []
    for image, (found, truth, names) in enumerate(zip(proposals, targets.boxes, targets.labels, strict=True)):
        pool = torch.cat([truth.to(found.boxes.dtype), found.boxes])
        source = torch.cat([torch.full_like(names, -1), found.source])
        if len(truth):
            iou, match = box_iou(truth.to(pool.dtype), pool).max(0)
            labels = torch.where(iou >= settings.iou, names[match], -1)
            matched = truth.to(pool.dtype)[match]
        else:
            labels, matched = torch.full_like(source, -1), torch.zeros_like(pool)
        positive, negative = sampler([labels + 1])
        take = torch.where(positive[0].bool() | negative[0].bool())[0]
        parts.append((pool[take], torch.full_like(take, image), source[take], labels[take], matched[take]))
    boxes, image_M, source_M, labels_M, matched_M4 = (torch.cat(column) for column in zip(*parts, strict=True))
    return RoIs(boxes, image_M, source_M, labels_M, matched_M4)


def unlabelled_rois(proposals: Sequence[Proposals]) -> RoIs:
    """All proposals as RoIs without labels: inference."""
    boxes = torch.cat([p.boxes for p in proposals])
    image = torch.cat([torch.full_like(p.source, number) for number, p in enumerate(proposals)])
    source = torch.cat([p.source for p in proposals])
    return RoIs(boxes, image, source, torch.full_like(source, -1), torch.zeros_like(boxes))
