"""Latency of the exported files, measured by the runtime that ships in a process without torch, here or on a target."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from pydantic import Field

from deploy.machine import machine
from deploy.work import Task
from pipeline.config import BaseConfig
from pipeline.errors import PipelineError
from pipeline.log import logger
from stages.artifacts.dataset import Dataset
from stages.artifacts.exported_model import ExportedModel
from stages.artifacts.reports import LatencyReport, LatencyRow
from stages.data.coco import CocoSplit
from stages.evaluation.there import image_files, model_files, model_settings, sent, taken

BACKENDS = tuple(f"deploy.backends.{name}" for name in ("onnxruntime", "openvino", "tensorrt", "tensorrt_rtx"))
# Run in a process of their own, here or there.
CODE = ("deploy.__main__", "deploy.latency", "deploy.tasks.benchmark", *BACKENDS)


class Config(BaseConfig):
    iterations: int = Field(default=1000, ge=1)
    """Predictions of one image that count; p99 needs 1,000."""
    images: int = Field(default=32, ge=1)
    """Validation images that take turns."""
    threads: int | None = Field(default=None, ge=1)
    """Threads of the runtime; as many as there are cores if not given."""


def identity(config: Config) -> dict[str, Any]:
    """Latency belongs to the machine it was measured on."""
    found = machine()
    return {name: found[name] for name in ("cpu", "cores", "architecture")}


def run(config: Config, directory: Path, *, data: Dataset, models: list[ExportedModel]) -> LatencyReport:
    """One row a model."""
    split = CocoSplit(data.folder("val"), data.annotations("val"))
    rows = []
    for model in models:
        model.refuse_unexecuted("benchmark")
    for model in models:
        found = measured(model, split.files[: config.images], config)
        rows.append(row_of(model, found))
    return LatencyReport(rows=tuple(rows))


def work(config: Config, folder: Path, *, data: Dataset, models: list[ExportedModel]) -> list[str]:
    """One task a model."""
    images = image_files(data, config.images)
    settings = {"images": [f"inputs/{name}" for name in images], "measure": {"iterations": config.iterations}}
    tasks = [
        Task(model.name, "benchmark", {**model_settings(model, threads=config.threads), **settings}) for model in models
    ]
    return sent(folder, tasks, {name: file for model in models for name, file in model_files(model).items()} | images)


def take(
    config: Config, directory: Path, folder: Path, target: str, *, data: Dataset, models: list[ExportedModel]
) -> tuple[LatencyReport, dict[str, Any]]:
    """The same rows, of the machine that measured them."""
    results, device = taken(folder)
    found = {name: {**one.value, "machine": one.device} for name, one in results.items()}
    return LatencyReport(rows=tuple(row_of(model, found[model.name], target) for model in models)), device


def row_of(model: ExportedModel, found: dict[str, Any], target: str = "") -> LatencyRow:
    """The row of what `deploy.latency` found of a model."""
    total, peak = found["steps"]["end_to_end"], found["peak_rss_bytes"]
    logger.info(
        "%-28s p50 %s ms  p99 %s ms%s",
        model.name,
        total["p50"],
        total["p99"],
        "" if found["reliable"] else "  UNRELIABLE: " + "; ".join(found["reasons"]),
    )
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
        target=target,
        runtime=found["backend"],
        steps=found["steps"],
        threads=found["backend"].get("threads", 1),  # of a GPU's engine: the one that waits for it
        flops=model.flops,
        peak_memory_mb=peak / 1e6 if peak else None,
        reliable=found["reliable"],
        evidence={**found["evidence"], "reasons": found["reasons"]},
    )


def measured(model: ExportedModel, images: list[Path], config: Config) -> dict[str, Any]:
    """What `deploy benchmark --json` says of a file: here as on a device. Raises PipelineError with its words."""
    file = model.path(model.file)
    command = [sys.executable, "-P", "-m", "deploy", "benchmark", str(file), *map(str, images)]
    command += ["--iterations", str(config.iterations), "--json", "--backend", model.backend]
    if config.threads:
        command += ["--threads", str(config.threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PipelineError(f"benchmark: {file.name}: {done.stderr.strip()}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found
