"""Does a file detect what the PyTorch detector detects, in the same images and as its contract says?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

from deploy.backend import Backend
from deploy.contract import Contract
from deploy.detections import Detections
from deploy.parity import Parity, Tolerance, compare, unsuppressed
from deploy.predictor import Predictor

BATCH = 4  # two and more: a file that only works with one image would pass otherwise


class Reference:
    """What `backend` detects in `images`, computed once for all files that are compared with it."""

    def __init__(self, backend: Backend, contract: Contract, images: Sequence[Path]) -> None:
        self.backend, self.contract, self.images = backend, contract, images
        self.before_nms = unsuppressed(contract)

    @cached_property
    def detections(self) -> list[Detections]:
        """After NMS, from the threshold on from which AP is measured."""
        return self._found(self.backend, self.contract)

    @cached_property
    def candidates(self) -> list[Detections]:
        """Before NMS."""
        return self._found(self.backend, self.before_nms)

    def parity(self, file: Path, tolerance: Tolerance) -> Parity:
        """Compare what a file detects."""
        with Predictor.open(file) as shipped:
            found = self._found(shipped.backend, self.contract)
            return self.parity_of(found, lambda: self._found(shipped.backend, self.before_nms), tolerance)

    def parity_of(
        self, found: Sequence[Detections], before: Callable[[], Sequence[Detections]], tolerance: Tolerance
    ) -> Parity:
        """Compare what was detected, here or elsewhere; `before` gives what was there before NMS."""
        threshold, most = self.contract.evaluation_score_threshold, self.contract.max_detections
        parity = compare(self.detections, found, tolerance, threshold, most)
        if parity.verdict:
            return parity
        # Two boxes that overlap by NMS's limit, to the last bit, are one detection here and another there. Then both
        # have both.
        return compare(self.detections, found, tolerance, threshold, most, (self.candidates, before()))

    def _found(self, backend: Backend, contract: Contract) -> list[Detections]:
        return list(Predictor(backend, contract).batch(self.images, BATCH, contract.evaluation_score_threshold))
