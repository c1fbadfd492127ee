"""Latency of the exported files, measured by the runtime that ships in a process without torch, here or on a target."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import Field

from deploy.cuda import devices
from deploy.machine import machine
from deploy.work import Task
from pipeline.config import BaseConfig
from pipeline.errors import PipelineError
from pipeline.log import logger
from stages.artifacts.dataset import Dataset
from stages.artifacts.exported_model import ExportedModel
from stages.artifacts.reports import LatencyReport, LatencyRow
from stages.data.coco import CocoSplit
from stages.evaluation.there import BACKENDS, image_files, model_files, model_settings, sent, taken

# Run in a process of their own, here or there.
CODE = ("deploy.__main__", "deploy.arrivals", "deploy.latency", "deploy.tasks.benchmark", *BACKENDS)


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
    found, (gpus, _) = machine(), devices()
    return {name: found[name] for name in ("cpu", "cores", "architecture")} | {"gpus": [gpu["name"] for gpu in gpus]}


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
        model.refuse_unexecuted("benchmark")
    for model in models:
        for batch, threads in product(sweep(config.batch), sweep(config.threads)):
            found = measured(model, split.files[: config.images], config, batch, threads)
            rows.append(row_of(model, found, directory, len(rows)))
    return LatencyReport(rows=tuple(rows))


def work(config: Config, folder: Path, *, data: Dataset, models: list[ExportedModel]) -> list[str]:
    """One task a model, batch and number of threads."""
    images = image_files(data, config.images)
    settings = {"images": [f"inputs/{name}" for name in images], "rate": config.rate}
    tasks = [
        Task(
            name,
            "benchmark",
            {
                **model_settings(model, threads=threads),
                **settings,
                "measure": {"iterations": config.iterations, "batch": batch},
            },
        )
        for name, (model, batch, threads) in combinations(config, models).items()
    ]
    return sent(folder, tasks, {name: file for model in models for name, file in model_files(model).items()} | images)


def take(
    config: Config, directory: Path, folder: Path, target: str, *, data: Dataset, models: list[ExportedModel]
) -> tuple[LatencyReport, dict[str, Any]]:
    """The same rows, of the machine that measured them."""
    results, device = taken(folder)
    rows: list[LatencyRow] = []
    for name, (model, _, _) in combinations(config, models).items():
        found = {**results[name].value, "machine": results[name].device}
        rows.append(row_of(model, found, directory, len(rows), target))
    return LatencyReport(rows=tuple(rows)), device


def combinations(
    config: Config, models: Sequence[ExportedModel]
) -> dict[str, tuple[ExportedModel, int | None, int | None]]:
    """Model, batch and threads of every measurement, by the name of its task."""
    several = len(sweep(config.batch)) * len(sweep(config.threads)) > 1
    return {
        f"{model.name}-batch{batch}-threads{threads or 'all'}" if several else model.name: (model, batch, threads)
        for model, batch, threads in product(models, sweep(config.batch), sweep(config.threads))
    }


def sweep(value: int | list[int] | None) -> Sequence[int | None]:
    """One value or several, as several."""
    return value if isinstance(value, list) else [value]


def row_of(model: ExportedModel, found: dict[str, Any], directory: Path, number: int, target: str = "") -> LatencyRow:
    """What `deploy.latency` found of a model, as a row, which is told to the log; its calls are written beside."""
    peak = found["peak_rss_bytes"]
    calls = directory / f"{model.name or model.key}-{number}.json"
    calls.write_text(json.dumps(found["calls"]))
    row = LatencyRow(
        name=model.name,
        kind="exported",
        key=model.key,
        source=model.source,
        backend=f"{found['backend']['runtime']} {found['backend']['version']}",
        sha256=model.sha256,
        parameters=model.parameters,
        bytes=model.bytes,
        machine=found["machine"],
        target=target,
        runtime=found["backend"],
        steps=found["steps"],
        threads=found["backend"].get("threads", 1),  # of a GPU's engine: the one that waits for it
        batch=found["batch"],
        images_per_second=found["images_per_second"],
        flops=model.flops,
        peak_memory_mb=peak / 1e6 if peak else None,
        reliable=found["reliable"],
        evidence={**found["evidence"], "reasons": found["reasons"]},
        at_rate=found["at_rate"],
        calls=calls.name,
    )
    told(row)
    return row


def told(row: LatencyRow) -> None:
    """The row, in the log."""
    total = row.steps["end_to_end"]
    doubt = "" if row.reliable else "  UNRELIABLE: " + "; ".join(row.evidence["reasons"])
    logger.info(
        "%-28s batch %s threads %s  p50 %s ms  p99 %s ms%s",
        row.label,
        row.batch,
        row.threads,
        total["p50"],
        total["p99"],
        doubt,
    )


def measured(
    model: ExportedModel, images: list[Path], config: Config, batch: int | None, threads: int | None
) -> dict[str, Any]:
    """What `deploy benchmark --json` says of a file: here as on a device. Raises PipelineError with its words."""
    file = model.path(model.file)
    command = [sys.executable, "-P", "-m", "deploy", "benchmark", str(file), *map(str, images)]
    command += ["--iterations", str(config.iterations), "--json", "--batch", str(batch), "--backend", model.backend]
    for name, value in (("--threads", threads), ("--rate", config.rate)):
        command += [name, str(value)] if value else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PipelineError(f"benchmark: {file.name}: {done.stderr.strip()}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found
