"""A foreign detector as it was given: its file untouched, everything around it in numpy. What the adapted file must equal.

The adapter's description is taken at its word by both; whether it is true is told by AP, and by what `implausible` sees.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploy.backend import Backend, Candidates
from stages.exporting.adapter import Adapter
from stages.exporting.foreign import Foreign

_OUTSIDE = 0.5  # share of the boxes that may lie elsewhere, before the description is doubted
_SHARES = 2.0  # pixels: boxes of which no side is further away are taken for shares of the input's sides
_EDGE = 1e-3  # of a probability


class AsGiven(Backend):
    """Runs the original file on ONNX Runtime, one image a call, and decodes in numpy."""

    def __init__(self, foreign: Foreign, adapter: Adapter) -> None:
        self.foreign, self.adapter = foreign, adapter
        self.session = foreign.session()
        self.places = [foreign.outputs.index(one) for one in adapter.layout.outputs]

    def infer(self, images_BHWC: NDArray[np.uint8]) -> Candidates:
        """Candidates of uint8 RGB images of the canvas."""
        found = []
        for image in images_BHWC:
            outputs = self.foreign.run(self.session, self.adapter.feed(image[None]))
            found.append(self.adapter.read([outputs[place] for place in self.places]))
        boxes, scores, labels = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return Candidates(boxes, scores, labels)

    def identity(self) -> dict[str, Any]:
        """ONNX Runtime on the CPU, with numpy around it."""
        import onnxruntime

        return {"runtime": "onnxruntime", "version": onnxruntime.__version__, "provider": "CPUExecutionProvider"}

    def close(self) -> None:
        """Frees the session."""
        del self.session


def implausible(found: Candidates, adapter: Adapter, threshold: float) -> Iterator[str]:
    """What candidates of real images say against the description that they were decoded by; nothing if all looks right.

    Another order of colours, another mean or another placement cannot be seen here; they cost AP.
    """
    scores, boxes = found.scores_BN, found.boxes_BN4
    if not (np.isfinite(scores).all() and np.isfinite(boxes).all()):
        yield "some candidates are not finite; give another layout or activation"
        return
    low, high = float(scores.min()), float(scores.max())
    # sigmoid of a probability lies between those of 0 and of 1; where an objectness multiplies, between their squares.
    least, most = (value ** (1 + adapter.layout.objectness) for value in (0.5, 1 / (1 + np.exp(-1.0))))
    if high > 1 + _EDGE or low < -_EDGE:
        yield f"scores lie between {low:.3g} and {high:.3g} and are no probabilities; set activation: sigmoid or softmax"
    elif adapter.activation == "sigmoid" and least - _EDGE <= low and high <= most + _EDGE:
        yield (
            f"all scores lie between {low:.3f} and {high:.3f}, as sigmoid makes them of what are probabilities already; set "
            "activation: none"
        )
    sure = boxes[scores > threshold]
    if not len(sure):
        yield f"no score is above {threshold:g} in any image, the best is {high:.3g}; give another input or activation"
        return
    canvas = adapter.layout.canvas
    middle_x, middle_y = (sure[:, 0] + sure[:, 2]) / 2, (sure[:, 1] + sure[:, 3]) / 2
    inside = (middle_x >= 0) & (middle_x <= canvas.width) & (middle_y >= 0) & (middle_y <= canvas.height)
    sized = (sure[:, 2:] > sure[:, :2]).all(1)
    if np.abs(sure).max() <= _SHARES:
        yield f"no box is further than {_SHARES:g} px from the corner; they seem to be shares of the sides: set unit: true"
    elif (away := 1 - float((inside & sized).mean())) > _OUTSIDE:
        yield (
            f"{away:.0%} of the boxes with a score above {threshold:g} lie outside of the input of {canvas.height}x"
            f"{canvas.width} or have no size; give another layout, box, unit or strides"
        )
