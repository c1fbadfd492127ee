"""Which layers must keep their precision: detections say how much each one costs, and as few as possible are kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from deploy.detections import Detections
from deploy.parity import match


def disagreement(reference: Sequence[Detections], other: Sequence[Detections]) -> float:
    """How far the detections of the same images are from those of a reference: 0 for the same, 1 where none is found again.

    One minus the weighted Jaccard index: a pair of one label shares the smaller score times its IoU of the larger score,
    and what has no partner shares nothing of its own. Moved boxes, changed scores and lost objects all count, each by
    its score; unlike AP it needs no annotations and tells small changes of few images.
    """
    shared = total = 0.0
    for a, b in zip(reference, other, strict=True):
        rows, columns = match(a, b)
        same = a.labels[rows] == b.labels[columns]
        rows, columns = rows[same], columns[same]
        left, right = a.scores[rows], b.scores[columns]
        shared += float((np.minimum(left, right) * _pairs_iou(a.boxes_xyxy[rows], b.boxes_xyxy[columns])).sum())
        total += float(a.scores.sum() + b.scores.sum() - np.minimum(left, right).sum())
    return 1 - shared / total if total else 0.0


def fewest(ranked: Sequence[str], passes: Callable[[tuple[str, ...]], bool], most: int) -> tuple[str, ...] | None:
    """A shortest prefix of `ranked`, of `most` at most, that passes: found by doubling, then by halving the last step.

    None where none that was tried passes. Exact where more layers never hurt, and whatever it returns has passed.
    """
    most = min(most, len(ranked))
    failed, count = -1, 0
    while not passes(tuple(ranked[:count])):
        failed = count
        if count == most:
            return None
        count = min(most, max(1, 2 * count))
    while count - failed > 1:
        middle = (count + failed) // 2
        if passes(tuple(ranked[:middle])):
            count = middle
        else:
            failed = middle
    return tuple(ranked[:count])


def _pairs_iou(a_N4: NDArray[np.float32], b_N4: NDArray[np.float32]) -> NDArray[np.float32]:
    sides = np.clip(np.minimum(a_N4[:, 2:], b_N4[:, 2:]) - np.maximum(a_N4[:, :2], b_N4[:, :2]), 0, None)
    inter = sides.prod(axis=1)
    union = (a_N4[:, 2:] - a_N4[:, :2]).prod(axis=1) + (b_N4[:, 2:] - b_N4[:, :2]).prod(axis=1) - inter
    return np.where(union > 0, inter / np.where(union > 0, union, 1), 0)
