"""Detections: what was found in one image, the currency between prediction, evaluation, parity and drawing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from deploy.errors import DeployError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Detections:
    """Boxes (N, 4) float32, scores (N,) float32 and labels (N,) int64 of one image; checked, ValueError when they do
    not fit.

    `boxes_xyxy` are x1, y1, x2, y2 in pixels of the original image; labels are contiguous from 0. `postprocess.detect`
    sorts them by score, highest first.
    """

    boxes_xyxy: NDArray[np.float32]
    scores: NDArray[np.float32]
    labels: NDArray[np.int64]

    def __post_init__(self) -> None:
        count = len(self.scores)
        wanted = {
            "boxes_xyxy": ((count, 4), np.float32),
            "scores": ((count,), np.float32),
            "labels": ((count,), np.int64),
        }
        for name, (shape, dtype) in wanted.items():
            array = getattr(self, name)
            if array.shape != shape or array.dtype != dtype:
                given = f"{array.dtype} of shape {array.shape}"
                raise ValueError(f"detections: {name} must be {np.dtype(dtype)} of shape {shape}, given {given}")
        if not (np.isfinite(self.boxes_xyxy).all() and np.isfinite(self.scores).all()):
            raise ValueError("detections: boxes and scores must be finite")
        if (self.boxes_xyxy[:, 2:] < self.boxes_xyxy[:, :2]).any():
            raise ValueError("detections: boxes must have x1 <= x2 and y1 <= y2")
        if (self.labels < 0).any():
            raise ValueError("detections: labels must not be negative")

    def __len__(self) -> int:
        return len(self.scores)

    def to_list(self, classes: Sequence[str]) -> list[dict[str, Any]]:
        """One `{box_xyxy, score, label, class}` a detection: the JSON of `deploy predict`."""
        return [
            {
                "box_xyxy": [round(side, 3) for side in box],
                "score": round(score, 6),
                "label": label,
                "class": classes[label],
            }
            for box, score, label in zip(
                self.boxes_xyxy.tolist(), self.scores.tolist(), self.labels.tolist(), strict=True
            )
        ]

    def to_supervision(self, classes: Sequence[str] | None = None) -> Any:
        """The same as `supervision.Detections`: xyxy, confidence, class_id, and with `classes` data["class_name"].

        Raises DeployError when supervision (MIT licence) is not installed.
        """
        try:
            import supervision
        except ImportError as error:
            raise DeployError(
                f"detections: supervision cannot be imported ({error}); pip install supervision"
            ) from error
        named = {} if classes is None else {"class_name": np.asarray([classes[label] for label in self.labels], str)}
        return supervision.Detections(
            xyxy=self.boxes_xyxy.copy(), confidence=self.scores.copy(), class_id=self.labels.copy(), data=named
        )

    @classmethod
    def from_list(cls, rows: Sequence[dict[str, Any]]) -> Detections:
        """The inverse of `to_list`. Raises DeployError when a row lacks something or cannot be."""
        try:
            return cls(
                np.asarray([row["box_xyxy"] for row in rows], np.float32).reshape(-1, 4),
                np.asarray([row["score"] for row in rows], np.float32),
                np.asarray([row["label"] for row in rows], np.int64),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DeployError(f"detections: rows of box_xyxy, score and label are wanted ({error})") from error
