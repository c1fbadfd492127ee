"""Candidates become detections: score threshold, clipping, class-wise NMS, the best so many.

The same for every backend.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from deploy.detections import Detections
from deploy.errors import DeployError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from deploy.backend import Candidates
    from deploy.contract import Contract
    from deploy.image import Placement

_BLOCK = 128  # candidates looked at together: large enough to be vectorised, small enough to stop early


def detect(
    candidates: Candidates,
    contract: Contract,
    placement: Placement,
    score_threshold: float | None = None,
    max_detections: int | None = None,
) -> Detections:
    """The detections of one image (B = 1), in pixels of the original image, sorted by score; equal scores keep the
    graph's order.

    Scores must exceed the threshold (the contract's deployment threshold unless given). Boxes are clipped to the
    image's content before NMS, so that what hangs over the padding does not dilute an overlap; boxes of no size and
    non-finite ones are dropped.
    """
    if len(candidates) != 1:
        raise ValueError(f"detect: candidates of one image are wanted, given {len(candidates)} images")
    threshold = contract.score_threshold if score_threshold is None else score_threshold
    limit = contract.max_detections if max_detections is None else max_detections
    if contract.nms == "graph":
        _refuse_dropped(contract, threshold, max_detections)
    boxes, scores, labels = candidates.boxes_BN4[0], candidates.scores_BN[0], candidates.labels_BN[0]
    kept = np.flatnonzero(scores > threshold)
    x1, y1, x2, y2 = placement.limits_xyxy
    boxes = np.clip(boxes[kept], [x1, y1, x1, y1], np.asarray([x2, y2, x2, y2], np.float32))
    # NaN compares false, so a box with a NaN side counts as one without size.
    sized = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    kept, boxes = kept[sized], boxes[sized]
    order = np.argsort(-scores[kept], kind="stable")
    kept, boxes = kept[order], boxes[order]
    if contract.nms == "host":
        groups = np.zeros_like(labels[kept]) if contract.class_agnostic_nms else labels[kept]
        chosen = suppress(boxes, groups, contract.nms_iou, limit)
    else:
        chosen = np.arange(min(limit, len(kept)))
    kept, boxes = kept[chosen], boxes[chosen]
    return Detections(
        placement.to_original(boxes),
        scores[kept].astype(np.float32, copy=False),
        labels[kept].astype(np.int64, copy=False),
    )


def least_score(contract: Contract) -> float:
    """Scores above it take part in NMS inside a graph: whichever threshold is applied afterwards, nothing lacks."""
    return min(contract.score_threshold, contract.evaluation_score_threshold)


def _refuse_dropped(contract: Contract, threshold: float, limit: int | None) -> None:
    """Raises DeployError when more is asked for than NMS in the graph lets out."""
    problems = []
    if threshold < least_score(contract):
        problems.append(f"scores above {least_score(contract)}, given a threshold of {threshold}")
    if limit is not None and limit > contract.candidates:
        problems.append(f"{contract.candidates} detections an image, given a limit of {limit}")
    if problems:
        raise DeployError(
            f"detect: the file does its own NMS and keeps {' and '.join(problems)}; ask for less, or export with nms: host"
        )


def suppress(
    boxes_xyxy: NDArray[np.float32], groups: NDArray[np.int64], iou_threshold: float, limit: int
) -> NDArray[np.int64]:
    """Greedy NMS within each group: indices of the first `limit` boxes that survive, given boxes from best to worst.

    A box falls when its IoU with a surviving better box of its group exceeds the threshold. Boxes are taken a block at
    a time against the survivors so far and then among themselves, which ends as soon as `limit` survive.
    """
    survivors = np.empty(0, np.int64)
    for start in range(0, len(boxes_xyxy), _BLOCK):
        block = np.arange(start, min(start + _BLOCK, len(boxes_xyxy)))
        if len(survivors):
            beaten = _overlap(boxes_xyxy, groups, survivors, block, iou_threshold).any(axis=0)
            block = block[~beaten]
        beats = np.triu(_overlap(boxes_xyxy, groups, block, block, iou_threshold), 1)
        alive = np.ones(len(block), bool)
        for row in np.flatnonzero(beats.any(axis=1)):
            if alive[row]:
                alive &= ~beats[row]
        survivors = np.concatenate([survivors, block[alive]])
        if len(survivors) >= limit:
            break
    return survivors[:limit]


def _overlap(
    boxes: NDArray[np.float32],
    groups: NDArray[np.int64],
    rows: NDArray[np.int64],
    columns: NDArray[np.int64],
    iou_threshold: float,
) -> NDArray[np.bool_]:
    ax1, ay1, ax2, ay2 = (side[:, None] for side in boxes[rows].T)
    bx1, by1, bx2, by2 = boxes[columns].T
    width = np.maximum(np.minimum(ax2, bx2) - np.maximum(ax1, bx1), 0)
    height = np.maximum(np.minimum(ay2, by2) - np.maximum(ay1, by1), 0)
    inter = width * height
    union = (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - inter
    over: NDArray[np.bool_] = (inter > iou_threshold * union) & (groups[rows][:, None] == groups[columns])
    return over
