"""What does a step of each method cost over the sum of its parts, and a plain step over torchvision's own model?

    python benchmarks/step.py [METHOD ...] [--repeats 5] [--steps 6] [--out RESULT.json]

Every method file is found by its name, and tried on the quickstart's student and teacher, or on the first pair below
that it fits; a batch of 16 images of 128 pixels. CPU seconds (all threads) of a forward and backward pass; the arms
take turns within each repeat, and medians over repeats are compared. A part is run on detached feature maps, so that
the sum counts each piece of work once:

    student's step + teacher's features + teacher's heads + the method alone, in which are
    proposals + sampling + teacher's head on the RoIs + assistants (forward, own loss, backward)

Memory is what a process that makes two steps holds at most, beyond what it held before. Exit code 3 where a method
costs more than 1.05 times the sum of its parts, or a plain step more than torchvision's. The sum without the imitation
(adapters and their errors) has no limit: it is shown.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
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
from pipeline import lookup
from pipeline.config import Choice
from pipeline.errors import PipelineError, UserError
from stages.detection.detector import Detector
from stages.detection.proposals import SamplingSettings, sample_rois
from stages.detection.records import DensePredictions, ProposalSettings, Targets
from stages.distillation.assistant import Assistance, Assistant, RoISettings
from stages.distillation.method import DistillationBatch, DistillationMethod
from stages.distillation.task import DistillationTask
from stages.training.clock import Clock

LIMIT = 1.05
SIZE = (128, 128)
CLOCK = Clock(100, 1000, 100, (667, 917))
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
# Students and teachers; a method is tried on the first pair that it fits. The quickstart's is the first.
PAIRS = {
    "retinanet < faster_rcnn": (STUDENT, TEACHER),
    "retinanet < retinanet": (STUDENT, STUDENT),
    "faster_rcnn < faster_rcnn": (TEACHER, TEACHER),
}
ROIS = {"proposals_before_nms": 128, "proposals": 64, "rois": 16}
# Settings that fit small images; a method that is not named here is measured as it is by default.
SETTINGS: dict[str, dict[str, Any]] = {
    "pkd": {"weight": 6},
    "head": {**ROIS, "akd": 0.3, "ckd": 0.3},
    "crosskd": {"convs": 1},
    "tf_head": {
        **ROIS,
        "assistants": {
            "rcnn": {"assistant": {"name": "rcnn", "head": {"hidden": 128, "sampling_ratio": 1}}},
            "fcos": {"assistant": {"name": "fcos", "weight": 0.5, "head": {"convs": 2}}},
        },
    },
    "task_adaptive": {"classification": 0, "regression": 0},
}
TOGETHER = "head+pkd"


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


Run = Callable[[], None]


class Pair:
    """A student, its teacher, one batch, and what both make of it: what every arm of a method needs."""

    def __init__(self, student: dict[str, Any], teacher: dict[str, Any]) -> None:
        torch.manual_seed(0)
        self.student, self.teacher = detector(student), detector(teacher)
        self.plain = DistillationTask(self.student, self.teacher)  # freezes the teacher
        self.images, self.targets = batch()
        with torch.no_grad():
            self.features, self.guide = self.student.features(self.images), self.teacher.features(self.images)
            self.predictions = self.student.predict(self.features, self.targets)
            self.guide_predictions = self.teacher.predict(self.guide)

    def method(self, name: str) -> DistillationMethod:
        """Raises UserError where the method does not fit this pair."""
        choice = Choice.parse(DistillationMethod, {"name": name, **SETTINGS.get(name, {})})
        made: DistillationMethod = choice.cls(choice.config, self.student, self.teacher)
        return made

    def step(self, task: nn.Module) -> None:
        """A whole step, but for the optimizer."""
        torch.stack(list(task(self.images, self.targets, CLOCK).values())).sum().backward()

    def given(self, known: bool = True) -> DistillationBatch:
        """A batch whose maps are leaves: what lies before them is not run again. `known`: nor is the teacher."""
        leaf = partial(map, lambda map_: map_.detach().requires_grad_())
        predictions = self.predictions
        if isinstance(predictions, DensePredictions):
            predictions = replace(predictions, class_tower=tuple(leaf(predictions.class_tower)))
        features = replace(
            self.features, backbone=tuple(leaf(self.features.backbone)), levels=tuple(leaf(self.features.levels))
        )
        made = DistillationBatch(self.images, self.targets, self.student, features, predictions, CLOCK, self.teacher)
        if known:
            made.__dict__ |= {"teacher_features": self.guide, "teacher_predictions": self.guide_predictions}
        return made

    def alone(self, method: DistillationMethod) -> None:
        """The method alone."""
        torch.stack(list(method(self.given()).values())).sum().backward()

    def teacher_features(self) -> None:
        with torch.no_grad():
            self.teacher.features(self.images)

    def teacher_heads(self) -> None:
        with torch.no_grad():
            self.teacher.predict(self.guide)

    def asks_heads(self, method: DistillationMethod) -> bool:
        """Whether the method reads the teacher's predictions: then their cost is a part."""
        given = self.given(known=False)
        method(given)
        return "teacher_predictions" in given.__dict__


def inner_parts(pair: Pair, method: Any) -> dict[str, Run]:
    """What happens inside a method that samples RoIs, each piece alone; nothing for others."""
    settings = method.config
    if not isinstance(settings, RoISettings):
        return {}
    sizes, given = pair.targets.sizes, pair.given()
    wanted = ProposalSettings(settings.proposals_before_nms, 0.7, settings.proposals)
    found = pair.student.proposals(pair.predictions, sizes, wanted)
    sampling = SamplingSettings(settings.rois)
    settings.choose(given)  # the batch keeps its RoIs, so the assistants below find them

    def proposals() -> None:
        pair.student.proposals(pair.predictions, sizes, wanted)

    def sampled() -> None:
        sample_rois(found, pair.targets, sampling)

    def asked(assistant: Assistant, assistance: Assistance) -> None:
        with torch.no_grad():
            assistant.ask(pair.teacher, pair.guide, assistance)

    def assisted(assistant: Assistant) -> None:
        torch.stack(list(assistant(given, settings).losses.values())).sum().backward()

    parts: dict[str, Run] = {"proposals": proposals, "sampling": sampled}
    for name, module in method.named_modules():
        if isinstance(module, Assistant):
            parts[name] = partial(assisted, module)
            if method.needs_teacher:
                parts["teacher's head"] = partial(asked, module, module(given, settings))
    return parts


def arms(wanted: Sequence[str]) -> tuple[dict[str, Run], dict[str, tuple[str, ...]], dict[str, str]]:
    """Each arm is a forward and backward pass that leaves the gradients of one step. Also: of which other arms the sum
    of a method's parts is made, and the pair of each method or why it has none."""
    theirs = Torchvision(detector(STUDENT)).train()
    images, targets = batch()
    runs: dict[str, Run] = {"torchvision": lambda: theirs(images, targets).backward()}
    sums: dict[str, tuple[str, ...]] = {}
    where: dict[str, str] = {}
    pairs = {name: Pair(*settings) for name, settings in PAIRS.items()}
    for name in wanted:
        for label, pair in pairs.items():
            try:
                method = pair.method(name)
            except (UserError, PipelineError) as problem:
                where[name] = f"not measured: {problem}"
                continue
            where[name] = label
            mark = "" if label == next(iter(PAIRS)) else f" ({label})"
            shared: dict[str, Run] = {f"plain{mark}": partial(pair.step, pair.plain)}
            if method.needs_teacher:
                shared[f"part: teacher's features{mark}"] = pair.teacher_features
                if pair.asks_heads(method):
                    shared[f"part: teacher's heads{mark}"] = pair.teacher_heads
            runs |= shared
            runs[name] = partial(pair.step, DistillationTask(pair.student, pair.teacher, {name: method}))
            runs[f"part: {name}"] = partial(pair.alone, method)
            runs |= {f"  in {name}: {part}": run for part, run in inner_parts(pair, method).items()}
            sums[name] = (*shared, f"part: {name}")
            break
    if {"head", "pkd"} <= sums.keys():
        pair = next(iter(pairs.values()))
        both = {name: pair.method(name) for name in ("pkd", "head")}
        runs[TOGETHER] = partial(pair.step, DistillationTask(pair.student, pair.teacher, both))
        sums[TOGETHER] = (*dict.fromkeys([*sums["head"], *sums["pkd"]]),)
    return runs, sums, where


def measured(runs: dict[str, Run], repeats: int, steps: int) -> dict[str, list[float]]:
    """CPU milliseconds a step of every arm, one number a repeat."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            begun = time.process_time()
            for _ in range(steps):
                run()
            if repeat:  # the first warms up
                found[name].append(1e3 * (time.process_time() - begun) / steps)
    return found


def peak_memory(run: Run) -> float:
    """MB that two steps hold at most beyond what was held before, in a process of their own."""
    forking = multiprocessing.get_context("fork")
    receive, send = forking.Pipe(duplex=False)

    def held() -> float:
        # kB; a forked process begins with the peak of what it holds
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3

    def twice() -> None:
        before = held()
        run()
        run()
        send.send(held() - before)

    process = forking.Process(target=twice)
    process.start()
    found: float = receive.recv()
    process.join()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("methods", nargs="*", help="which; all that there are, if none is named")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1, help="one by default: waiting threads count as CPU time")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    runs, sums, where = arms(arguments.methods or lookup.names("stages.distillation.methods"))
    memory = {name: peak_memory(run) for name, run in runs.items() if ":" not in name}
    found = measured(runs, arguments.repeats, arguments.steps)
    middle = {name: statistics.median(values) for name, values in found.items()}
    ratios = {f"{name} / parts": middle[name] / sum(middle[part] for part in parts) for name, parts in sums.items()}
    for name in sums:
        if inner := [part for part in middle if part.startswith(f"  in {name}: ")]:
            parts = [part for part in sums[name] if part != f"part: {name}"]
            ratios[f"{name} / parts, imitation left out"] = middle[name] / sum(
                middle[part] for part in [*parts, *inner]
            )
    ratios |= {"plain / torchvision": middle["plain"] / middle["torchvision"]} if "plain" in middle else {}
    for name, values in found.items():
        held = f"  {memory[name]:6.0f} MB" if name in memory else ""
        print(f"{name:46} {middle[name]:8.1f} ms  ({min(values):.1f} to {max(values):.1f}){held}")
    limits = {name: 1.0 if "torchvision" in name else LIMIT for name in ratios if "left out" not in name}
    for name, ratio in ratios.items():
        limit = f"limit {limits[name]:.2f}{'' if ratio <= limits[name] else '  EXCEEDED'}" if name in limits else ""
        print(f"{name:46} {ratio:8.3f}  {limit}".rstrip())
    for name, label in where.items():
        print(f"{name:46} {label}")
    if arguments.out:
        record = {
            "command": " ".join(["python", *sys.argv]),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": machine(),
            "torch": torch.__version__,
            "threads": arguments.threads,
            "pairs": where,
            "cpu_ms_per_step": found,
            "peak_mb": memory,
            "parts": sums,
            "ratios": ratios,
        }
        arguments.out.write_text(json.dumps(record, indent=2) + "\n")
    return 3 if any(ratios[name] > limit for name, limit in limits.items()) else 0


if __name__ == "__main__":
    sys.exit(main())
