"""What does a distillation step cost over the sum of its parts, and a plain step over torchvision's own model?

    python benchmarks/step.py [--repeats 5] [--steps 6] [--out RESULT.json]

The quickstart's student and teacher, a batch of 16 images of 128 pixels. CPU seconds (all threads) of a forward and
backward pass; the arms take turns within each repeat, and medians over repeats are compared. A part of HEAD or PKD is
run on detached feature maps, so that the sum counts each piece of work once. Exit code 3 where HEAD or PKD cost more
than 1.05 times the sum of their parts, or a plain step more than torchvision's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet as TorchvisionRetinaNet
from torchvision.models.detection.retinanet import RetinaNetHead

from deploy.machine import machine
from pipeline.config import Choice
from stages.detection.detector import Detector, Features, Targets
from stages.distillation.method import DistillationBatch, DistillationMethod
from stages.distillation.task import DistillationTask
from stages.training.clock import Clock

LIMIT = 1.05
SIZE = (128, 128)
CLOCK = Clock(100, 1000, 100)
SHARED = {
    "backbone": "tiny",
    "backbone_norm": "batch",
    "trainable_layers": 5,
    "neck_channels": 48,
    "aspect_ratios": [1.0],
}
STUDENT = {"name": "retinanet", "extra_levels": 1, "head_convs": 2, "head_norm": "group", "anchor_scale": 2, **SHARED}
TEACHER = {
    "name": "faster_rcnn",
    "extra_levels": 0,
    "anchor_scale": 4,
    "proposals": 64,
    "proposals_training": 64,
    "rois": 32,
    "roi_head": {"hidden": 128, "sampling_ratio": 1},
    **SHARED,
}
METHODS = {
    "pkd": {"name": "pkd", "weight": 4},
    "head": {"name": "head", "proposals_before_nms": 128, "proposals": 64, "rois": 16, "akd": 0.3, "ckd": 0.3},
}


def detector(settings: dict[str, Any]) -> Detector:
    choice = Choice.parse(Detector, settings)
    made: Detector = choice.cls.build(choice.config, 10)
    return made.to(memory_format=torch.channels_last).train()


def batch() -> tuple[Tensor, Targets]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (16, 3, *SIZE), dtype=torch.uint8, generator=generator)
    corner = torch.rand(16, 3, 2, generator=generator) * 80
    side = 18 + torch.rand(16, 3, 2, generator=generator) * 26
    boxes = torch.cat([corner, corner + side], -1)
    labels = torch.randint(0, 10, (16, 3), generator=generator)
    return images.contiguous(memory_format=torch.channels_last), Targets(list(boxes), list(labels), [SIZE] * 16)


class Torchvision(nn.Module):
    """torchvision's RetinaNet with the student's own backbone, neck, anchors and depth of head."""

    def __init__(self, student: Any) -> None:
        super().__init__()

        class Backbone(nn.Module):
            out_channels = 48

            def __init__(self) -> None:
                super().__init__()
                self.body, self.fpn = student.backbone.body, student.backbone.fpn

            def forward(self, x: Tensor) -> Any:
                stages = self.body(x)
                return self.fpn({name: stages[name] for name in list(stages)[1:]})

        head = RetinaNetHead(48, student.per_cell, 10, norm_layer=partial(nn.GroupNorm, 16))
        for part in (head.classification_head, head.regression_head):
            part.conv = part.conv[:2]
        self.model = TorchvisionRetinaNet(
            Backbone(), 10, min_size=SIZE[0], max_size=SIZE[0], anchor_generator=student.anchors.generator, head=head
        ).to(memory_format=torch.channels_last)

    def forward(self, images: Tensor, targets: Targets) -> Tensor:
        described = [{"boxes": b, "labels": n} for b, n in zip(targets.boxes, targets.labels, strict=True)]
        return sum(self.model(list(images.float() / 255), described).values())


def arms() -> dict[str, Callable[[], None]]:
    """Each arm is a forward and backward pass that leaves the gradients of one step."""
    torch.manual_seed(0)
    student, teacher = detector(STUDENT), detector(TEACHER)
    images, targets = batch()
    methods: dict[str, DistillationMethod] = {}
    for name, settings in METHODS.items():
        choice = Choice.parse(DistillationMethod, settings)
        methods[name] = choice.cls(choice.config, student, teacher)
    theirs = Torchvision(detector(STUDENT)).train()

    def step(task: nn.Module) -> None:
        torch.stack(list(task(images, targets, CLOCK).values())).sum().backward()

    def teacher_features() -> None:
        with torch.no_grad():
            teacher.features(images)

    with torch.no_grad():
        known, guide = student.features(images), teacher.features(images)
        predictions = student.predict(known, targets)

    def method(name: str) -> None:
        """The method alone: the student's maps are leaves, the teacher's features are there already."""
        levels = tuple(level.detach().requires_grad_() for level in known.levels)
        towers = tuple(tower.detach().requires_grad_() for tower in predictions.class_tower)
        given = DistillationBatch(
            images,
            targets,
            student,
            Features(known.backbone, levels, known.size),
            replace(predictions, class_tower=towers),
            CLOCK,
            teacher,
        )
        given.__dict__["teacher_features"] = guide
        torch.stack(list(methods[name](given).values())).sum().backward()

    return {
        "plain": partial(step, DistillationTask(student, teacher)),
        "torchvision": lambda: theirs(images, targets).backward(),
        "pkd": partial(step, DistillationTask(student, teacher, {"pkd": methods["pkd"]})),
        "head": partial(step, DistillationTask(student, teacher, {"head": methods["head"]})),
        "head+pkd": partial(step, DistillationTask(student, teacher, methods)),
        "part: teacher's features": teacher_features,
        "part: pkd": partial(method, "pkd"),
        "part: head": partial(method, "head"),
    }


def measured(repeats: int, steps: int) -> dict[str, list[float]]:
    """CPU milliseconds a step of every arm, one number a repeat."""
    runs = arms()
    found: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            begun = time.process_time()
            for _ in range(steps):
                run()
            if repeat:  # the first warms up
                found[name].append(1e3 * (time.process_time() - begun) / steps)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1, help="one by default: waiting threads count as CPU time")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    found = measured(arguments.repeats, arguments.steps)
    middle = {name: statistics.median(values) for name, values in found.items()}
    features = middle["part: teacher's features"]
    ratios = {
        "pkd / parts": middle["pkd"] / (middle["plain"] + features + middle["part: pkd"]),
        "head / parts": middle["head"] / (middle["plain"] + features + middle["part: head"]),
        "head+pkd / parts": middle["head+pkd"]
        / (middle["plain"] + features + middle["part: pkd"] + middle["part: head"]),
        "plain / torchvision": middle["plain"] / middle["torchvision"],
    }
    for name, values in found.items():
        print(f"{name:26} {middle[name]:8.1f} ms  ({min(values):.1f} to {max(values):.1f})")
    limits = {name: 1.0 if "torchvision" in name else LIMIT for name in ratios}
    for name, ratio in ratios.items():
        print(f"{name:26} {ratio:8.3f}  limit {limits[name]:.2f}{'' if ratio <= limits[name] else '  EXCEEDED'}")
    if arguments.out:
        record = {
            "command": " ".join(["python", *sys.argv]),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": machine(),
            "torch": torch.__version__,
            "threads": arguments.threads,
            "cpu_ms_per_step": found,
            "ratios": ratios,
        }
        arguments.out.write_text(json.dumps(record, indent=2) + "\n")
    return 3 if any(ratio > limits[name] for name, ratio in ratios.items()) else 0


if __name__ == "__main__":
    sys.exit(main())
