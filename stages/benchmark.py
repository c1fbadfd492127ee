"""Latency of the exported files, measured by the runtime that ships, in a process of its own without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import Field

from deploy.machine import machine
from pipeline.config import BaseConfig
from pipeline.errors import PipelineError
from pipeline.log import logger
from stages.artifacts.dataset import Dataset
from stages.artifacts.exported_model import ExportedModel
from stages.artifacts.reports import LatencyReport, LatencyRow
from stages.data.coco import CocoSplit

CODE = (
    "deploy.__main__",
    "deploy.arrivals",
    "deploy.latency",
    "deploy.backends.onnxruntime",
)  # run in a process of their own


class Config(BaseConfig):
    iterations: int = Field(default=1000, ge=1)
    """Calls that count; p99 needs 1,000."""
    images: int = Field(default=32, ge=1)
    """Validation images that take turns."""
    threads: int | list[int] | None = None
    """Threads of the runtime, or several numbers to compare; as many as there are cores if not given."""
    batch: int | list[int] = 1
    """Images of one call, or several numbers to compare. Gates and the release quote the first of batch and threads."""
    rate: float | None = Field(default=None, gt=0)
    """Requests a second that come whether or not the one before is done: their latency counts from when each is due."""


def identity(config: Config) -> dict[str, Any]:
    """Latency belongs to the machine it was measured on."""
    found = machine()
    return {name: found[name] for name in ("cpu", "cores", "architecture")}


def check(config: Config, wired: Mapping[str, Any]) -> Iterable[str]:
    """A sweep needs whole numbers above 0."""
    for name in ("threads", "batch"):
        values = sweep(getattr(config, name))
        if not values or any(value is not None and value < 1 for value in values):
            yield f"{name}: whole numbers of at least 1 are wanted, given {getattr(config, name)}"


def run(config: Config, directory: Path, *, data: Dataset, models: list[ExportedModel]) -> LatencyReport:
    """One row a model, batch and number of threads, each measured in a process of its own."""
    split = CocoSplit(data.folder("val"), data.annotations("val"))
    rows: list[LatencyRow] = []
    for model in models:
        for batch, threads in product(sweep(config.batch), sweep(config.threads)):
            found = measured(model.path(model.file), split.files[: config.images], config, batch, threads)
            calls = directory / f"{model.name or model.key}-{len(rows)}.json"
            calls.write_text(json.dumps(found["calls"]))
            rows.append(row_of(model, found, calls.name))
            told(rows[-1])
    return LatencyReport(rows=tuple(rows))


def sweep(value: int | list[int] | None) -> Sequence[int | None]:
    """One value or several, as several."""
    return value if isinstance(value, list) else [value]


def row_of(model: ExportedModel, found: dict[str, Any], calls: str) -> LatencyRow:
    """What `deploy benchmark` found, as a row."""
    peak = found["peak_rss_bytes"]
    return LatencyRow(
        name=model.name,
        kind="exported",
        key=model.key,
        source=model.source,
        backend=f"{found['backend']['runtime']} {found['backend']['version']}",
        sha256=model.sha256,
        parameters=model.parameters,
        bytes=model.bytes,
        machine=found["machine"],
        runtime=found["backend"],
        steps=found["steps"],
        threads=found["backend"]["threads"],
        batch=found["batch"],
        images_per_second=found["images_per_second"],
        flops=model.flops,
        peak_memory_mb=peak / 1e6 if peak else None,
        reliable=found["reliable"],
        evidence={**found["evidence"], "reasons": found["reasons"]},
        at_rate=found["at_rate"],
        calls=calls,
    )


def told(row: LatencyRow) -> None:
    """The row, in the log."""
    total = row.steps["end_to_end"]
    doubt = "" if row.reliable else "  UNRELIABLE: " + "; ".join(row.evidence["reasons"])
    logger.info(
        "%-28s batch %s threads %s  p50 %s ms  p99 %s ms%s",
        row.name,
        row.batch,
        row.threads,
        total["p50"],
        total["p99"],
        doubt,
    )


def measured(file: Path, images: list[Path], config: Config, batch: int | None, threads: int | None) -> dict[str, Any]:
    """What `deploy benchmark --json` says of a file: here as on a device. Raises PipelineError with its words."""
    command = [sys.executable, "-P", "-m", "deploy", "benchmark", str(file), *map(str, images)]
    command += ["--iterations", str(config.iterations), "--json", "--batch", str(batch)]
    for name, value in (("--threads", threads), ("--rate", config.rate)):
        command += [name, str(value)] if value else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PipelineError(f"benchmark: {file.name}: {done.stderr.strip()}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found
