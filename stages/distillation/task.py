"""Student, teacher and methods as one module that returns named losses: the training loop does not know that it distils."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from stages.detection.detector import Detector, Targets
from stages.distillation.method import DistillationBatch, DistillationMethod, in_full
from stages.training.clock import Clock


class DistillationTask(nn.Module):
    """Saved keys are `student.*` and `methods.*`. The teacher is no submodule: it is never trained, saved or switched to
    train mode. Without methods this is plain training: the control."""

    def __init__(
        self,
        student: Detector,
        teacher: Detector | None = None,
        methods: Mapping[str, DistillationMethod] | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.methods = nn.ModuleDict(dict(methods or {}))
        self._teacher = (teacher,)  # inside a tuple, where nn.Module does not look
        if teacher is not None:
            teacher.eval().requires_grad_(False)

    @property
    def teacher(self) -> Detector | None:
        return self._teacher[0]

    def parameter_groups(self) -> list[tuple[list[nn.Parameter], float]]:
        """Trainable parameters with their share of the learning rate."""
        groups = [([p for p in self.student.parameters() if p.requires_grad], 1.0)]
        for method in self.methods.values():
            assert isinstance(method, DistillationMethod)
            groups.append(([p for p in method.parameters() if p.requires_grad], method.config.lr_scale))
        return [group for group in groups if group[0]]

    def forward(self, images_BCHW: Tensor, targets: Targets, clock: Clock) -> dict[str, Tensor]:
        """Images (uint8 or float, [0, 255]) and their targets to losses named `student/...` and `METHOD/...`."""
        features = self.student.features(images_BCHW)
        predictions = self.student.predict(features, targets)
        losses = {f"student/{name}": loss for name, loss in self.student.loss(predictions, targets).items()}
        if not self.methods:
            return losses
        device = images_BCHW.device.type
        half = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        # Correlations and squared errors of features lose what they measure in half precision.
        with torch.autocast(device, enabled=False):
            batch = DistillationBatch(
                images_BCHW, targets, self.student, in_full(features), in_full(predictions), clock, self.teacher, half
            )
            for name, method in self.methods.items():
                losses |= {f"{name}/{term}": loss for term, loss in method(batch).items()}
        return losses
