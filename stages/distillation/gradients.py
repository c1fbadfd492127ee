"""How much of the gradient each loss gives at the start: the first thing to look at when a distillation does nothing,
or nothing else.

Norms of each loss's gradient with respect to the maps of neck and backbone, at a few of the first 50 steps. Reading them
changes nothing: `autograd.grad` writes no `.grad`, draws no random number, and the graph is kept for the training's own
backward pass.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from pipeline.listing import columns
from pipeline.log import logger
from stages.artifacts.checkpoint import GradientShare
from stages.detection.records import Features
from stages.training.clock import Clock

STEPS = (1, 10, 20, 30, 40, 49)  # iterations; not 0, where every weight that warms up is still 0
DWARFS = 100.0  # a loss whose gradient is this many times that of the detection losses leaves them no say
DETECTION = "student"  # the detection losses together, beside each of them as student/NAME
PREFIX = "gradient/"

Norms = Mapping[str, float]
"""`gradient/neck/LOSS` and `gradient/backbone/LOSS` to a norm, as in metrics.jsonl."""


def gradient_norms(losses: Mapping[str, Tensor], features: Features) -> dict[str, float]:
    """The norm of each loss's gradient over all levels of the neck, and over all stages of the backbone; that of the
    detection losses' sum is called `student`. `features` are those that the losses were computed from."""
    # Half precision has no numbers below 6e-8, where most gradients of a mean lie; a power of two is exact.
    scale = 1024.0 if features.levels[0].dtype == torch.float16 else 1.0
    places = {
        "neck": [level for level in features.levels if level.requires_grad],
        "backbone": [stage for stage in features.backbone if stage.requires_grad],
    }
    maps = [one for group in places.values() for one in group]
    found: dict[str, Tensor] = {}
    together = [torch.zeros_like(one, dtype=torch.float32) for one in maps]
    for name, loss in losses.items():
        gradients = _gradients(loss * scale, maps)
        if name.startswith(f"{DETECTION}/"):
            together = [sum_ + one for sum_, one in zip(together, gradients, strict=True)]
        found |= _by_place(name, gradients, places)
    found |= _by_place(DETECTION, together, places)
    norms = (torch.stack(list(found.values())) / scale).tolist()
    return dict(zip(found, norms, strict=True))


def _gradients(loss: Tensor, maps: Sequence[Tensor]) -> list[Tensor]:
    if not maps or not loss.requires_grad:
        return [torch.zeros_like(one, dtype=torch.float32) for one in maps]
    found = torch.autograd.grad(loss, maps, retain_graph=True, materialize_grads=True)
    return [one.float() for one in found]


def _by_place(name: str, gradients: Sequence[Tensor], places: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
    split, left = {}, list(gradients)
    for place, maps in places.items():
        own, left = left[: len(maps)], left[len(maps) :]
        norms = [torch.linalg.vector_norm(one) for one in own] or [torch.zeros(())]
        split[f"{PREFIX}{place}/{name}"] = torch.linalg.vector_norm(torch.stack(norms)).cpu()
    return split


class GradientLog:
    """Measures at `STEPS` of one training, and says in its log what was found."""

    def __init__(self) -> None:
        self._rows: list[Norms] = []
        self._fresh: dict[str, float] = {}

    def measure(self, losses: Mapping[str, Tensor], features: Features, clock: Clock) -> None:
        """Take the norms if this step is one of those; at the last of them, write the table and the warnings."""
        if clock.iteration not in STEPS or not torch.is_grad_enabled():
            return
        self._fresh = gradient_norms(losses, features)
        self._rows.append(self._fresh)
        if clock.iteration == max(step for step in STEPS if step < clock.iterations):
            for line in table(shares(self._rows)):
                logger.info("%s", line)
            for warning in warnings(self._rows):
                logger.warning("%s", warning)

    def take(self) -> dict[str, float]:
        """The norms of the step that was measured last, once."""
        taken, self._fresh = self._fresh, {}
        return taken


def of_metrics(file: Path) -> list[Norms]:
    """The norms that a training left in its metrics.jsonl; after a resume they are all there."""
    if not file.is_file():
        return []
    rows = (json.loads(line) for line in file.read_text(encoding="utf-8").splitlines())
    norms = [{name: value for name, value in row.items() if name.startswith(PREFIX)} for row in rows]
    return [one for one in norms if one]


def shares(rows: Sequence[Norms]) -> list[GradientShare]:
    """Each loss's share of the sum of all losses' norms, from means over the steps."""
    neck, backbone = _means(rows, "neck"), _means(rows, "backbone")
    names = [name for name in neck if name != DETECTION]
    totals = [sum(means[name] for name in names) or 1.0 for means in (neck, backbone)]
    return [
        GradientShare(loss=name, neck=neck[name] / totals[0], backbone=backbone[name] / totals[1]) for name in names
    ]


def warnings(rows: Sequence[Norms]) -> list[str]:
    """A sentence for each loss without any gradient, and for each that leaves the detection losses no say."""
    neck, backbone = _means(rows, "neck"), _means(rows, "backbone")
    found = []
    for name in (name for name in neck if name != DETECTION):
        if not neck[name] and not backbone[name]:
            found.append(
                f"loss {name} gave the student no gradient in the first {STEPS[-1] + 1} steps: it is dead; "
                "see its weight, its warm-up, and whether what it reads is ever there"
            )
        elif not name.startswith(f"{DETECTION}/"):
            ratios = [means[name] / means[DETECTION] for means in (neck, backbone) if means[DETECTION]]
            if ratios and max(ratios) > DWARFS:
                found.append(
                    f"loss {name} has {max(ratios):.0f} times the gradient of the detection losses together: "
                    "it leaves them no say; lower its weight"
                )
    return found


def table(found: Sequence[GradientShare]) -> list[str]:
    """The shares as lines of a log."""
    head = ("share of the gradient at the start", "neck", "backbone")
    return list(columns([head, *((one.loss, f"{one.neck:.1%}", f"{one.backbone:.1%}") for one in found)]))


def _means(rows: Sequence[Norms], place: str) -> dict[str, float]:
    """Mean norm of each loss at a place; a norm that is not finite (null in the file) counts as no measurement."""
    start = f"{PREFIX}{place}/"
    known: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            if name.startswith(start):
                known.setdefault(name.removeprefix(start), []).extend([value] if value is not None else [])
    return {name: sum(values) / len(values) if values else 0.0 for name, values in known.items()}
