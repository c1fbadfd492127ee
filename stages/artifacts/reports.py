"""Measurements: each row is one model on one backend on one machine, with the hash of the file it was measured on."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from pipeline.artifact import Artifact


class Row(BaseModel):
    """Who was measured, where."""

    model_config = ConfigDict(frozen=True)

    name: str
    """Node that made it, e.g. `student[seed=0]`."""
    kind: Literal["trained", "distilled", "pruned", "exported"]
    key: str
    source: str
    """Key of what it was made from, which makes rows a chain."""
    backend: str
    sha256: str
    """Of the weights or model file."""
    parameters: int
    bytes: int
    machine: dict[str, Any]
    target: str = ""
    """Name of the other machine that it was measured on; empty for the one that ran the pipeline."""
    runtime: dict[str, Any] = {}
    """What the backend says of itself: provider or device really used, threads, precision."""

    @property
    def label(self) -> str:
        """The name, and on which other machine, where it was on one."""
        return f"{self.name} on {self.target}" if self.target else self.name


class AccuracyRow(Row):
    """COCO AP on the validation split."""

    statistics: dict[str, float | None]
    """The 12 COCO statistics: ap, ap50, ap75, ap_small, ..., ar100, ..."""
    per_class: dict[str, float | None]
    evaluator: str
    crosschecked: bool
    """Whether a second evaluator gave the same 12 numbers."""
    images: int
    results: str
    """COCO results file, for comparisons image by image."""


class AccuracyReport(Artifact):
    """AP of every model that was wired in."""

    rows: tuple[AccuracyRow, ...]


class LatencyRow(Row):
    """Milliseconds of a call, by step: decode, preprocess, inference, postprocess, end_to_end."""

    steps: dict[str, dict[str, float | None]]
    """Step to mean, p50, p90, p95, p99 (None where there were too few samples) and n."""
    threads: int
    batch: int = 1
    """Images of one call."""
    images_per_second: float | None = None
    flops: int
    """Of one image."""
    peak_memory_mb: float | None
    reliable: bool
    evidence: dict[str, Any]
    """What the machine did meanwhile: least, median and most of all that it told; `reasons` for doubt."""
    at_rate: dict[str, Any] | None = None
    """Response to requests at a fixed rate, if that was asked for."""
    calls: str = ""
    """JSON beside: when every call began, in seconds from the first, and its milliseconds."""


class LatencyReport(Artifact):
    """Latency of every model that was wired in."""

    rows: tuple[LatencyRow, ...]


class Gate(BaseModel):
    """What was asked, what was measured."""

    model_config = ConfigDict(frozen=True)

    name: str
    asked: str
    measured: str
    passed: bool
    """A gate whose number could not be measured has not passed."""


class Report(Artifact):
    """The verdict: report.html, report.md, report.json and junit.xml lie beside."""

    gates: tuple[Gate, ...]
    html: str = "report.html"
    json_file: str = "report.json"
