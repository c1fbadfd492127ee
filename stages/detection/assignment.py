"""ATSS: which points stand for an object, by what the object's own neighbourhood looks like (arXiv 1912.02424, section 4).

The `nearest` points of each level to an object's centre are its candidates; those are taken whose anchors overlap it by
at least the mean plus the deviation of all candidates' overlaps, and which lie inside it. Anchors are squares of
`scale` strides' side around the points; nothing but their overlap is read from them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import box_iou

from stages.detection.records import Anchors


class Assignment(NamedTuple):
    """`match_A`: index of the object each anchor stands for, or -1 (background). `iou_AN`: overlaps of anchors and objects;
    `threshold_N`: the least overlap for each object."""

    match_A: Tensor
    iou_AN: Tensor
    threshold_N: Tensor


def squares(anchors: Anchors, scale: float) -> Tensor:
    """(A, 4) xyxy: anchors around the same centres, their sides times `scale`."""
    boxes = anchors.boxes_A4
    centre, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2 * scale
    return torch.cat([centre - half, centre + half], 1)


@torch.no_grad()
def atss(truth_N4: Tensor, boxes_A4: Tensor, per_level: list[int], nearest: int = 9) -> Assignment:
    """Assign anchors `boxes_A4`, level after level, to the objects; where an anchor may stand for several it takes the one
    that it overlaps most."""
    if not len(truth_N4):
        none = torch.full((len(boxes_A4),), -1, dtype=torch.int64, device=boxes_A4.device)
        return Assignment(none, boxes_A4.new_zeros(len(boxes_A4), 0), boxes_A4.new_zeros(0))
    iou_AN = box_iou(boxes_A4, truth_N4)
    point_A2 = (boxes_A4[:, :2] + boxes_A4[:, 2:]) / 2
    centre_N2 = (truth_N4[:, :2] + truth_N4[:, 2:]) / 2
    distance_AN = torch.linalg.vector_norm(point_A2[:, None] - centre_N2, dim=2)
    candidates, begin = [], 0
    for count in per_level:
        near = distance_AN[begin : begin + count].topk(min(nearest, count), dim=0, largest=False).indices
        candidates.append(near + begin)
        begin += count
    candidate_CN = torch.cat(candidates)
    overlap_CN = iou_AN.gather(0, candidate_CN)
    spread_N = overlap_CN.std(0) if len(overlap_CN) > 1 else torch.zeros_like(overlap_CN[0])
    threshold_N = overlap_CN.mean(0) + spread_N
    sides_AN4 = torch.cat([point_A2[:, None] - truth_N4[:, :2], truth_N4[:, 2:] - point_A2[:, None]], 2)
    chosen_AN = torch.zeros_like(iou_AN, dtype=torch.bool).scatter_(0, candidate_CN, overlap_CN >= threshold_N)
    chosen_AN &= sides_AN4.amin(2) > 0.01
    best = torch.where(chosen_AN, iou_AN, -1.0).max(1)
    return Assignment(torch.where(best.values >= 0, best.indices, -1), iou_AN, threshold_N)
