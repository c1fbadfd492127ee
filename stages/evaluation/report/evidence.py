"""Evidence: all that is wired into a report, joined by key: who was measured, how it was trained, what it came from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import fmean
from typing import Any

from deploy.gain import Gain, paired_bootstrap
from stages.artifacts.checkpoint import DistilledCheckpoint, TrainedDetector
from stages.artifacts.dataset import Dataset
from stages.artifacts.exported_model import ExportedModel
from stages.artifacts.reports import AccuracyReport, AccuracyRow, LatencyReport, LatencyRow, Row


@dataclass(frozen=True)
class Roles:
    """Names of the stages that play the parts of the story."""

    teacher: str
    student: str
    control: str
    equal_time_control: str


def stage_of(node: str) -> str:
    """`control[seed=0]` belongs to the stage `control`."""
    return node.partition("[")[0]


def axes_of(node: str) -> str:
    """`seed=0` of `control[seed=0]`; empty without a matrix."""
    return node.partition("[")[2].removesuffix("]")


@dataclass(frozen=True, eq=False)
class Evidence:
    """The inputs of a report. Rows keep the order in which they were measured."""

    data: Dataset
    accuracy: Sequence[AccuracyReport]
    latency: Sequence[LatencyReport]
    checkpoints: Sequence[TrainedDetector]
    models: Sequence[ExportedModel]
    roles: Roles
    _gains: dict[tuple[str, str], Gain] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def rows(self) -> list[AccuracyRow]:
        """Every row of AP."""
        return [row for report in self.accuracy for row in report.rows]

    @cached_property
    def latency_rows(self) -> list[LatencyRow]:
        """Every row of latency."""
        return [row for report in self.latency for row in report.rows]

    @cached_property
    def trainings(self) -> list[TrainedDetector]:
        """Every training once: a pruned student was not trained again."""
        return [one for one in self.checkpoints if one.metrics is not None]

    @cached_property
    def exported(self) -> list[AccuracyRow]:
        """Rows of AP of files that ship."""
        return [row for row in self.rows if row.kind == "exported"]

    def of_stage(self, stage: str) -> list[AccuracyRow]:
        """Rows of the nodes of one stage: several where it has a matrix."""
        return [row for row in self.rows if stage_of(row.name) == stage]

    def nodes_of(self, stage: str) -> list[str]:
        """Names of the nodes of one stage, measured or only wired in."""
        names = [*(row.name for row in self.rows), *(checkpoint.name for checkpoint in self.checkpoints)]
        return [name for name in dict.fromkeys(names) if stage_of(name) == stage]

    def row(self, key: str) -> AccuracyRow | None:
        """The first row of AP of an artifact."""
        return next((row for row in self.rows if row.key == key), None)

    @cached_property
    def quoted_latency(self) -> list[LatencyRow]:
        """The first row of every file on every machine: of a sweep over batches and threads the one that gates judge."""
        first: dict[tuple[str, str, str], LatencyRow] = {}
        for row in self.latency_rows:
            first.setdefault((row.sha256, row.backend, str(row.machine)), row)
        return list(first.values())

    def calls(self, row: LatencyRow) -> dict[str, list[float]]:
        """When every call behind a row began and how long it took; empty where that was not kept."""
        owner = next(report for report in self.latency if any(row is own for own in report.rows))
        if not row.calls or not owner.path(row.calls).is_file():
            return {}
        return dict(json.loads(owner.path(row.calls).read_bytes()))

    def latency_of(self, row: AccuracyRow, batch: int | None = None) -> LatencyRow | None:
        """The first row of latency of the same file on the same machine; in calls of so many images, where that is said."""
        timings = (timed for timed in self.latency_rows if (timed.sha256, timed.target) == (row.sha256, row.target))
        return next((timed for timed in timings if batch in (None, timed.batch)), None)

    @property
    def measure_again(self) -> str:
        """How latency is measured again; empty where it was not measured."""
        stages = dict.fromkeys(stage_of(report.name) for report in self.latency)
        flags = " ".join(f"--force {stage}" for stage in stages)
        return f"to measure again, on a machine that does nothing else: `pipeline run CONFIG {flags}`" if flags else ""

    def checkpoint(self, key: str) -> TrainedDetector | None:
        """The checkpoint of a key, if it is wired in."""
        return next((checkpoint for checkpoint in self.checkpoints if checkpoint.key == key), None)

    def model(self, key: str) -> ExportedModel | None:
        """The exported model of a key, if it is wired in."""
        return next((model for model in self.models if model.key == key), None)

    def gain(self, before: AccuracyRow, after: AccuracyRow) -> Gain:
        """The change of AP from one row to another with its interval over images; computed once."""
        pair = (before.label, after.label)
        if pair not in self._gains:
            annotations = self.data.annotations("val")
            self._gains[pair] = paired_bootstrap(self.results(before), self.results(after), annotations)
        return self._gains[pair]

    def lineage(self, key: str) -> Iterator[str]:
        """The key, that of what it was made from, and so on, as far as it is known."""
        while key:
            yield key
            key = self.sources.get(key, "")

    def training(self, key: str) -> TrainedDetector | None:
        """The checkpoint that knows of the training behind an artifact: of a pruned student the distilled one."""
        known = None
        for ancestor in self.lineage(key):
            found = self.checkpoint(ancestor)
            known = known or found
            if found is not None and found.metrics is not None:
                return found
            if self.learnt(ancestor):  # before it lies the teacher's training
                break
        return known

    @cached_property
    def sources(self) -> dict[str, str]:
        """Key to the key of what it was made from, also of what was not measured."""
        made: list[Row | TrainedDetector | ExportedModel] = [
            *self.rows,
            *self.latency_rows,
            *self.checkpoints,
            *self.models,
        ]
        return {one.key: one.source for one in made if one.source}

    def learnt(self, key: str) -> bool:
        """Whether the step that made this artifact was a training by a teacher, after which AP is not comparable."""
        row = self.row(key)
        return isinstance(self.checkpoint(key), DistilledCheckpoint) or (row is not None and row.kind == "distilled")

    def results(self, row: AccuracyRow) -> list[dict[str, Any]]:
        """The COCO results that a row was computed from."""
        owner = next(report for report in self.accuracy if any(row is own for own in report.rows))
        return list(json.loads(owner.path(row.results).read_bytes()))


def mean_ap(rows: Sequence[AccuracyRow], statistic: str = "ap") -> float | None:
    """Mean of a statistic over rows; None where no row has it."""
    values = [value for row in rows if (value := row.statistics.get(statistic)) is not None]
    return fmean(values) if values else None
