"""A PyTorch detector behind the promise of a deployed one, so that it is measured by the same code."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from deploy.backend import Backend, Candidates
from stages.detection.detector import Detector


class InMemory(Backend):
    """`detector` in eval mode on its own device; restores the mode when closed."""

    def __init__(self, detector: Detector, count: int = 1000) -> None:
        self.detector = detector
        self.count = count
        self.was_training = detector.training
        detector.eval()

    def infer(self, images_BHWC: NDArray[np.uint8]) -> Candidates:
        """uint8 RGB images of the canvas to candidates on the host; synchronises by copying."""
        device = next(self.detector.parameters()).device
        images_BCHW = torch.from_numpy(images_BHWC).permute(0, 3, 1, 2).to(device)
        with torch.inference_mode():
            found = self.detector(images_BCHW, self.count)
        return Candidates(
            found.boxes_BN4.float().cpu().numpy(),
            found.scores_BN.float().cpu().numpy(),
            found.labels_BN.cpu().numpy(),
        )

    def identity(self) -> dict[str, Any]:
        """Runtime and device."""
        device = next(self.detector.parameters()).device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        return {"runtime": "torch", "version": torch.__version__, "device": name, "precision": "fp32"}

    def close(self) -> None:
        self.detector.train(self.was_training)
