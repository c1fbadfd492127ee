"""How long the trainings of a starter's config take on this machine: a step of the teacher and of the student is tried."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from deploy.machine import cores
from pipeline.config import Choice
from stages.detection.detector import Detector
from stages.detection.records import Targets

TRIED = 3  # steps after the first, which warms up
BOX = (8.0, 8.0, 24.0, 24.0)


class Setting(NamedTuple):
    """What a step's time depends on, beside the detector."""

    classes: int
    size: tuple[int, int]
    batch_size: int
    jobs: int


def minutes(config: Mapping[str, Any], classes: int) -> float:
    """Minutes in steps of `teacher`, `control` and `distilled` of a config; the first two run side by side where its `jobs`
    say so.

    An estimate. Validation, the optimizer and loading images, which is long for large photographs, are left out; what the
    methods do is taken to be what the teacher's forward pass is.
    """
    stages, jobs = config["stages"], config["jobs"]
    setting = Setting(classes, tuple(stages["data"]["size"]), stages["teacher"]["batch_size"], jobs)
    choices: list[Choice[Detector]] = [
        Choice.parse(Detector, stages[stage]["detector"]) for stage in ("teacher", "control")
    ]
    teacher, student = (step_seconds(choice, setting) for choice in choices)
    spent = {"teacher": teacher, "control": student, "distilled": student + 2 / 3 * teacher}
    seconds = {stage: stages[stage]["steps"] * step for stage, step in spent.items()}
    both = seconds["teacher"], seconds["control"]
    return float((max(both) if jobs > 1 else sum(both)) + seconds["distilled"]) / 60


def step_seconds(choice: Choice[Detector], setting: Setting) -> float:
    """The median seconds of a training step on noise, with its share of the cores."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, cores() // setting.jobs))
    try:
        (height, width), batch = setting.size, setting.batch_size
        detector = choice.cls.build(choice.config, setting.classes).to(device).train()
        images_BCHW = torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8, device=device)
        boxes, labels = torch.tensor([BOX], device=device), torch.zeros(1, dtype=torch.int64, device=device)
        targets = Targets([boxes] * batch, [labels] * batch, [(height, width)] * batch)
        spent = []
        for _ in range(1 + TRIED):
            began = time.perf_counter()
            losses = detector.loss(detector.predict(detector.features(images_BCHW), targets), targets)
            torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
            if device.type == "cuda":
                torch.cuda.synchronize()
            spent.append(time.perf_counter() - began)
        return statistics.median(spent[1:])
    finally:
        torch.set_num_threads(threads)
