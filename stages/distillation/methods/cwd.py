"""CWD, channel-wise distillation (arXiv 2011.13256; mmrazor/models/losses/cwd.py).

Each channel of a map becomes a distribution over its places, and the student's is drawn to the teacher's:

    L = weight * sum over maps of tau^2 / (B C) * sum over images and channels of KL(softmax(T / tau) || softmax(S / tau))

A shift of a channel does not matter, its scale does. Fits any two detectors with a pyramid; on the neck, as published
for detectors with a weight of 10 and tau of 1.
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field
from torch import Tensor
from torch.nn import functional

from stages.detection.detector import Detector
from stages.distillation.method import DistillationMethod, FeatureBatch, MethodConfig
from stages.distillation.pairing import PairedMaps, Pairing


def cwd_loss(student_BCHW: Tensor, teacher_BCHW: Tensor, tau: float = 1.0) -> Tensor:
    """The loss of one pair of maps of equal shape, unweighted; logarithms of the softmax keep large maps finite."""
    mine, theirs = (functional.log_softmax(x.flatten(2) / tau, 2) for x in (student_BCHW, teacher_BCHW.detach()))
    images, channels = student_BCHW.shape[:2]
    return tau**2 / (images * channels) * functional.kl_div(mine, theirs, reduction="sum", log_target=True)


class CWD(DistillationMethod):
    """The student's neck against the teacher's, channel by channel."""

    learns_unlabelled = True

    class Config(MethodConfig):
        weight: float = Field(default=10.0, ge=0)
        """Weight of each level's loss."""
        tau: float = Field(default=1.0, gt=0)
        """Temperature: above 1 the whole map counts, below 1 its peaks."""
        pairing: Pairing = "stride"
        """Levels of equal stride, or the finest with the finest; ours: the student's map is resized where sizes differ
        (the original refuses)."""

    def __init__(self, config: CWD.Config, student: Detector, teacher: Detector | None) -> None:
        super().__init__(config, student, teacher)
        assert teacher is not None
        self.config = config
        self.maps = PairedMaps("cwd", student, teacher, config.pairing)

    def forward(self, batch: FeatureBatch) -> Mapping[str, Tensor]:
        maps = self.maps(batch.features, batch.teacher_features)
        losses = [cwd_loss(mine, theirs, self.config.tau) for mine, theirs in maps]
        return {"feature": self.config.weight * sum(losses[1:], losses[0])}
