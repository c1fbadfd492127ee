"""Do two predictors find the same? Detections of the same real images, matched one to one; the differences and a
verdict.

Tensors are not compared: a swap of two equal scores is no fault, and a box that moved by 10 px may hide in a small mean
error.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from deploy.detections import Detections

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from deploy.contract import Contract

_MATCH_IOU = 0.5  # below it two boxes do not show the same object


@dataclass(frozen=True)
class Tolerance:
    """The largest differences that pass: of a box side in pixels of the images compared, and of a score."""

    box_px: float
    score: float


# The same float32 arithmetic in another order: measured at 1e-3 px and 1e-5 on exports; a real fault is far above.
FLOAT32 = Tolerance(box_px=0.1, score=1e-3)
# Half precision moves boxes by about half a pixel and scores by some thousandths.
FLOAT16 = Tolerance(box_px=1.0, score=1e-2)


def unsuppressed(contract: Contract) -> Contract:
    """The contract by which all that leaves the graph is a detection: no box is suppressed by another."""
    return replace(contract, nms_iou=1.0, max_detections=contract.candidates)


@dataclass(frozen=True)
class Parity:
    """What `compare` found. `excused` detections lack a partner only because they lie at the edge of what is kept, or
    their overlap at that of NMS, or their box has hardly a size."""

    images: int
    matched: int
    unmatched: int
    excused: int
    label_mismatches: int
    max_box_px: float
    max_score: float
    tolerance: Tolerance
    verdict: bool
    sentence: str

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def compare(
    reference: Sequence[Detections],
    other: Sequence[Detections],
    tolerance: Tolerance = FLOAT32,
    score_threshold: float = 0.0,
    max_detections: int | None = None,
    candidates: tuple[Sequence[Detections], Sequence[Detections]] | None = None,
) -> Parity:
    """The detections of the same images, in the same order, from two predictors that used this threshold and limit.

    A detection may lack a partner when its score lies within the tolerance of the threshold or, in an image with
    `max_detections`, of the lowest score kept, or a side of its box is no longer than the tolerance: boxes without size are
    dropped, and the other's may have none. Where `candidates` gives what both had before NMS, one may also lack it
    because an overlap lies at NMS's limit: if the other predictor has the very box, within the tolerance, among its
    candidates. No detections at all is no parity: there was nothing to compare. Raises ValueError when the numbers of
    images differ.
    """
    if len(reference) != len(other):
        raise ValueError(f"parity: {len(reference)} reference images but {len(other)} others")
    matched = unmatched = excused = mismatches = 0
    max_box, max_score = 0.0, 0.0
    for image, (a, b) in enumerate(zip(reference, other, strict=True)):
        edge = max(_edge(one, score_threshold, max_detections) for one in (a, b)) + tolerance.score
        rows, columns = match(a, b)
        known_a, known_b = (_sizeless(one, tolerance) for one in (a, b))  # to the other side, before NMS
        if candidates is not None:
            known_a |= _among(a, candidates[1][image], tolerance)
            known_b |= _among(b, candidates[0][image], tolerance)
            # A pair that differs, though each side had both boxes, is no pair: NMS kept one here and the other there.
            far = _differences(a, b, rows, columns) > (tolerance.box_px, tolerance.score)
            differs = far.any(1) | (a.labels[rows] != b.labels[columns])
            paired = ~(differs & known_a[rows] & known_b[columns])
            rows, columns = rows[paired], columns[paired]
        box, score = _differences(a, b, rows, columns).max(0, initial=0).tolist()
        max_box, max_score = max(max_box, box), max(max_score, score)
        matched += len(rows)
        mismatches += int((a.labels[rows] != b.labels[columns]).sum())
        alone = np.concatenate([np.delete(a.scores, rows), np.delete(b.scores, columns)])
        known = np.concatenate([np.delete(known_a, rows), np.delete(known_b, columns)])
        excused += int(((alone <= edge) | known).sum())
        unmatched += int(((alone > edge) & ~known).sum())
    problems = _problems(matched, unmatched, mismatches, Tolerance(max_box, max_score), tolerance)
    found = f"{matched} detections in {len(reference)} images matched within {max_box:.2g} px and {max_score:.2g} score"
    return Parity(
        images=len(reference),
        matched=matched,
        unmatched=unmatched,
        excused=excused,
        label_mismatches=mismatches,
        max_box_px=max_box,
        max_score=max_score,
        tolerance=tolerance,
        verdict=not problems,
        sentence=("differs: " + "; ".join(problems)) if problems else found,
    )


def _problems(matched: int, unmatched: int, mismatches: int, found: Tolerance, allowed: Tolerance) -> list[str]:
    """What is no parity; `found` are the largest differences."""
    problems = []
    if not matched:
        problems.append("no detection was compared; lower the threshold or choose other images")
    if unmatched:
        problems.append(f"{unmatched} detections without a partner")
    if mismatches:
        problems.append(f"{mismatches} with another label")
    if found.box_px > allowed.box_px:
        problems.append(f"a box moved by {found.box_px:.3g} px, {allowed.box_px:g} allowed")
    if found.score > allowed.score:
        problems.append(f"a score moved by {found.score:.2g}, {allowed.score:g} allowed")
    return problems


def match(a: Detections, b: Detections) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of the pairs that show the same object: greedily those of one label first, then by IoU, then by nearness
    of score.
    """
    iou = overlaps(a.boxes_xyxy, b.boxes_xyxy)
    rows, columns = np.nonzero(iou >= _MATCH_IOU)
    # Rounded: in the fifth digit IoU is noise, and the score tells equal boxes apart.
    overlap = np.round(iou[rows, columns], 4)
    order = np.lexsort((np.abs(a.scores[rows] - b.scores[columns]), -overlap, a.labels[rows] != b.labels[columns]))
    taken_a, taken_b = np.zeros(len(a), bool), np.zeros(len(b), bool)
    pairs = []
    for row, column in zip(rows[order].tolist(), columns[order].tolist(), strict=True):
        if not (taken_a[row] or taken_b[column]):
            taken_a[row] = taken_b[column] = True
            pairs.append((row, column))
    found = np.asarray(pairs, np.int64).reshape(-1, 2)
    return found[:, 0], found[:, 1]


def _differences(
    a: Detections, b: Detections, rows: NDArray[np.int64], columns: NDArray[np.int64]
) -> NDArray[np.float64]:
    """(pairs, 2): how far the sides of the boxes are apart at most, in pixels, and the scores."""
    box = np.abs(a.boxes_xyxy[rows] - b.boxes_xyxy[columns]).max(1, initial=0)
    return np.stack([box, np.abs(a.scores[rows] - b.scores[columns])], 1).astype(np.float64)


def _among(some: Detections, candidates: Detections, tolerance: Tolerance) -> NDArray[np.bool_]:
    """Whether each of `some` is one of the candidates, within the tolerance."""
    near = np.abs(some.boxes_xyxy[:, None] - candidates.boxes_xyxy[None]).max(2, initial=0) <= tolerance.box_px
    near &= np.abs(some.scores[:, None] - candidates.scores[None]) <= tolerance.score
    return np.asarray((near & (some.labels[:, None] == candidates.labels[None])).any(1))


def _sizeless(some: Detections, tolerance: Tolerance) -> NDArray[np.bool_]:
    """Whether a side of each is so short that rounding decides whether there is a box."""
    sides = some.boxes_xyxy[:, 2:] - some.boxes_xyxy[:, :2]
    return np.asarray(sides.min(1, initial=np.inf) <= tolerance.box_px)


def _edge(detections: Detections, score_threshold: float, max_detections: int | None) -> float:
    if max_detections is not None and len(detections) >= max_detections:
        return max(score_threshold, float(detections.scores.min()))
    return score_threshold


def overlaps(a_xyxy: NDArray[np.float32], b_xyxy: NDArray[np.float32]) -> NDArray[np.float64]:
    """IoU of every box of one with every box of the other, (N, 4) and (M, 4) to (N, M)."""
    a, b = a_xyxy[:, None].astype(np.float64), b_xyxy[None].astype(np.float64)
    sides = np.clip(np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]), 0, None)
    inter: NDArray[np.float64] = sides.prod(axis=-1)
    union = (a[..., 2:] - a[..., :2]).prod(axis=-1) + (b[..., 2:] - b[..., :2]).prod(axis=-1) - inter
    return np.where(union > 0, inter / np.where(union > 0, union, 1), 0)
