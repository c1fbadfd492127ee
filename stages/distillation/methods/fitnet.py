"""FitNet's hint, imitation of whole feature maps (arXiv 1412.6550), between necks as in LutingWang/HEAD
configs/_base_/models/fitnet_retina.py: a 1x1 convolution on the student's map, then the mean squared error.

    L = weight * sum over maps of MSE(A S, sg[T])

Fits any two detectors; maps are paired by stride. Magnitudes are compared, so a teacher whose features are large or
small beside the student's moves the weight that is right. `stages: all` is plain imitation of all stages: what
re-weighted methods are to be compared with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field
from torch import Tensor
from torch.nn import functional

from stages.detection.detector import Detector
from stages.distillation.method import DistillationMethod, FeatureBatch, MethodConfig
from stages.distillation.pairing import PairedMaps, Pairing, Stages


class FitNet(DistillationMethod):
    """Mean squared error between the student's adapted maps and the teacher's."""

    learns_unlabelled = True

    class Config(MethodConfig):
        weight: float = Field(default=1.0, ge=0)
        """Weight of each map's error; `neck` and `backbone` are logged apart."""
        stages: Stages = "neck"
        """The maps that are imitated: the neck's (published), the backbone's four stages, or both (ours)."""
        adapters: Literal["separate", "shared"] = "separate"
        """A 1x1 convolution for each map (published), or one for all, which needs equal channels."""
        pairing: Pairing = "stride"
        """Maps of equal stride, or (ours) the finest with the finest; the student's is resized where sizes differ."""

    def __init__(self, config: FitNet.Config, student: Detector, teacher: Detector | None) -> None:
        super().__init__(config, student, teacher)
        assert teacher is not None
        self.config = config
        self.maps = PairedMaps("fitnet", student, teacher, config.pairing, config.stages, config.adapters)

    def forward(self, batch: FeatureBatch) -> Mapping[str, Tensor]:
        losses: dict[str, Tensor] = {}
        maps = self.maps(batch.features, batch.teacher_features)
        for (mine, theirs), (backbone, *_) in zip(maps, self.maps.pairs, strict=True):
            name = "backbone" if backbone else "neck"
            error = self.config.weight * functional.mse_loss(mine, theirs)
            losses[name] = losses[name] + error if name in losses else error
        return losses
