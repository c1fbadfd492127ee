"""The best boxes of all that a dense head says, before NMS: what the exported graph ends in."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from stages.detection.records import Candidates, DensePredictions


def best_candidates(scores_BAK: Tensor, boxes_BA4: Tensor, count: int) -> Candidates:
    """Top `count` of all (anchor, class) pairs, best first, with their scores as given."""
    flat = scores_BAK.flatten(1)
    scores, index = flat.topk(min(count, flat.shape[1]), dim=1)
    classes = scores_BAK.shape[2]
    anchor = torch.div(index, classes, rounding_mode="floor")
    boxes = boxes_BA4.gather(1, anchor[..., None].expand(-1, -1, 4))
    return Candidates(boxes, scores, index % classes, anchor)


def by_probability(predictions: DensePredictions, count: int) -> Candidates:
    """Top `count` by logit; the sigmoid comes after the cut, which changes nothing."""
    best = best_candidates(predictions.logits_BAK, predictions.boxes_BA4, count)
    return replace(best, scores_BN=best.scores_BN.sigmoid())
