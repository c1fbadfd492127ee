"""Student, teachers and methods as one module that returns named losses: the training loop does not know that it distils."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from stages.detection.detector import Detector
from stages.detection.records import Targets
from stages.distillation.gradients import GradientLog
from stages.distillation.method import DistillationBatch, DistillationMethod, UnlabelledBatch, in_full
from stages.distillation.teachers import chosen
from stages.distillation.unlabelled import Unlabelled
from stages.training.clock import Clock
from stages.training.task import TrainingTask


class DistillationTask(TrainingTask):
    """Saved keys are `student.*` and `methods.*`. Teachers are no submodules: they are never trained, saved or switched to
    train mode. Without methods this is plain training: the control.

    `teachers` is one detector, or several by name, among which each method's `teacher` says its own. Raises UserError
    where a method needs one and it is not clear which.
    """

    def __init__(
        self,
        student: Detector,
        teachers: Detector | Mapping[str, Detector] | None = None,
        methods: Mapping[str, DistillationMethod] | None = None,
        unlabelled: Unlabelled | None = None,
    ) -> None:
        super().__init__()
        self.student: Detector = student
        self.methods = nn.ModuleDict(dict(methods or {}))
        named = {"teacher": teachers} if isinstance(teachers, Detector) else teachers
        self.teachers: dict[str, Detector] = dict(named or {})  # a dict, where nn.Module does not look
        self._taught_by = {
            name: chosen(method.config.teacher, method.needs_teacher, list(self.teachers))
            for name, method in (methods or {}).items()
        }
        for teacher in self.teachers.values():
            teacher.eval().requires_grad_(False)
        self.unlabelled = unlabelled
        self._gradients = GradientLog()

    def parameter_groups(self) -> list[tuple[list[nn.Parameter], float]]:
        """Trainable parameters with their share of the learning rate."""
        groups = [([p for p in self.student.parameters() if p.requires_grad], 1.0)]
        for method in self.methods.values():
            assert isinstance(method, DistillationMethod)
            groups.append(([p for p in method.parameters() if p.requires_grad], method.config.lr_scale))
        return [group for group in groups if group[0]]

    def forward(self, images_BCHW: Tensor, targets: Targets, clock: Clock) -> dict[str, Tensor]:
        """Images (uint8 or float, [0, 255]) and their targets to losses named `student/...` and `METHOD/...`."""
        self.student.done = clock.iteration / clock.iterations
        features = self.student.features(images_BCHW)
        predictions = self.student.predict(features, targets)
        losses = {f"student/{name}": loss for name, loss in self.student.loss(predictions, targets).items()}
        if not self.methods:
            return losses
        device = images_BCHW.device.type
        half = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        # Correlations and squared errors of features lose what they measure in half precision.
        with torch.autocast(device, enabled=False):
            seen = DistillationBatch(
                images_BCHW, targets, self.student, in_full(features), in_full(predictions), clock, None, half
            )
            batches = {name: replace(seen, teacher=teacher) for name, teacher in self.teachers.items()}
            for name, method in self.methods.items():
                batch = batches.get(self._taught_by[name] or "", seen)
                losses |= {f"{name}/{term}": loss for term, loss in method(batch).items()}
            if self.training:
                head_only = {f"student/{name}" for name in self.student.head_only}
                reaching = {name: loss for name, loss in losses.items() if name not in head_only}
                self._gradients.measure(reaching, features, clock)
        if self.unlabelled and self.training:
            losses |= self._without_labels(self.unlabelled, images_BCHW.device, clock, half)
        return losses

    def _without_labels(
        self, unlabelled: Unlabelled, device: torch.device, clock: Clock, half: torch.dtype | None
    ) -> dict[str, Tensor]:
        """Losses named `METHOD/unlabelled_...` of the methods that can, on this step's images without any."""
        images_BCHW = unlabelled.images(clock.iteration).to(device, memory_format=torch.channels_last)
        features = self.student.features(images_BCHW)
        losses: dict[str, Tensor] = {}
        with torch.autocast(device.type, enabled=False):
            mine = in_full(features)
            batches = {
                name: UnlabelledBatch(images_BCHW, mine, clock, teacher, half)
                for name, teacher in self.teachers.items()
            }
            for name, method in self.methods.items():
                taught_by = self._taught_by[name]
                if method.learns_unlabelled and taught_by is not None:
                    found = method(batches[taught_by])
                    losses |= {f"{name}/unlabelled_{term}": unlabelled.weight * loss for term, loss in found.items()}
        return losses

    def observations(self) -> dict[str, float]:
        """What the last step told beside its losses, for metrics.jsonl: the gradient norms, at the steps that take them."""
        return self._gradients.take()
