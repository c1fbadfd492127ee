"""MGD, masked generative distillation (arXiv 2205.01529; yzd-v/MGD det/mmdet/distillation/losses/mgd.py).

The student's map loses places at random, and a small network must make the teacher's whole map of the rest:

    L = weight * sum over levels of 1 / B * sum (G(mask * A S) - sg[T])^2,   G = 3x3 convolution, ReLU, 3x3 convolution

A is a 1x1 convolution where channels differ. Fits any two detectors with a pyramid. The error is a sum, not a mean: it
grows with the canvas, the channels and the square of the teacher's magnitude, and the published weights (2e-5 one-stage,
5e-7 two-stage at a ratio of 0.45) are those of 256 channels at 1333 x 800. The published runs also begin with the
teacher's neck and head in the student, which a student of another kind cannot.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor, nn

from stages.detection.detector import Detector
from stages.distillation.method import DistillationMethod, FeatureBatch, MethodConfig
from stages.distillation.pairing import PairedMaps, Pairing


def generator(channels: int) -> nn.Sequential:
    """The network that fills in what was masked, BCHW to BCHW."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1)
    )


def mgd_loss(
    generate: nn.Module, student_BCHW: Tensor, teacher_BCHW: Tensor, chance_B1HW: Tensor, ratio: float
) -> Tensor:
    """The loss of one pair of maps of equal shape, unweighted; a place is masked where its chance, uniform in [0, 1), is
    above 1 - `ratio` (strictly, as in the original)."""
    kept = chance_B1HW <= 1 - ratio
    error: Tensor = generate(student_BCHW * kept) - teacher_BCHW.detach()
    return error.square().sum() / len(student_BCHW)


class MGD(DistillationMethod):
    """A generator for each pair of levels; it goes with the method."""

    learns_unlabelled = True

    class Config(MethodConfig):
        weight: float = Field(default=2e-5, ge=0)
        """Weight of each level's sum of squares: 2e-5 for one-stage detectors, 5e-7 for two-stage ones."""
        ratio: float = Field(default=0.65, ge=0, le=1)
        """Share of the places that are masked: 0.65 for one-stage detectors, 0.45 for two-stage ones."""
        pairing: Pairing = "stride"
        """Levels of equal stride, or the finest with the finest; ours: the student's map is resized where sizes differ
        (the original cannot)."""

    def __init__(self, config: MGD.Config, student: Detector, teacher: Detector | None) -> None:
        super().__init__(config, student, teacher)
        assert teacher is not None
        self.config = config
        self.maps = PairedMaps("mgd", student, teacher, config.pairing)
        self.generators = nn.ModuleList(generator(channels) for channels in self.maps.channels)

    def forward(self, batch: FeatureBatch) -> Mapping[str, Tensor]:
        losses = []
        maps = self.maps(batch.features, batch.teacher_features)
        for generate, (mine, theirs) in zip(self.generators, maps, strict=True):
            # From torch's own generator, which the trainer seeds each step: a resumed run masks the same places.
            chance = torch.rand_like(theirs[:, :1])
            losses.append(mgd_loss(generate, mine, theirs, chance, self.config.ratio))
        return {"feature": self.config.weight * sum(losses[1:], losses[0])}
