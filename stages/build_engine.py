"""Build an engine from an exported file, count its precisions, and prove that it detects what the file detects.

On a target it is built and run there, and what it detected is compared here.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from deploy.backend import backend_class, build_engine, build_settings, names, open_backend
from deploy.contract import Contract
from deploy.detections import Detections
from deploy.errors import DeployError
from deploy.parity import Parity, Tolerance
from deploy.tasks.build import DETECTIONS
from deploy.work import Task
from pipeline import digest
from pipeline.config import BaseConfig
from pipeline.errors import UserError, VerdictError, did_you_mean
from pipeline.log import logger
from stages.artifacts.dataset import Dataset
from stages.artifacts.exported_model import ExportedModel, ParityRecord
from stages.data.coco import CocoSplit
from stages.evaluation.there import BACKENDS, image_files, model_files, sent, taken
from stages.exporting.agreement import BATCH, Reference
from stages.exporting.planned import PlannedFile, planned_file

CODE = ("deploy.tasks.build", *BACKENDS)  # reached by name at run time
LIMITS = {"fp32": (0.5, 1e-3), "fp16": (1.0, 1e-2)}  # pixels and score, where two runtimes must agree
WATCHED = Tolerance(box_px=8.0, score=0.1)  # what is taken for the same detection where AP decides


class Engine(BaseConfig):
    name: str
    """The runtime: openvino, tensorrt or tensorrt_rtx."""
    precision: Literal["fp32", "fp16", "bf16", "int8"] = "fp32"
    """What the engine must be, by the census of its layers. TensorRT builds what the exported file is, and a file that
    is something else is refused; OpenVINO computes a float32 file in float32 unless bf16 is asked for."""
    batch: tuple[int, int, int] | None = None
    """TensorRT: least, best and most images of one call; (1, 1, 8) if not given."""
    compute_capabilities: tuple[str, ...] | None = None
    """TensorRT-RTX: the GPUs it is for, as "8.6"; the GPU of this machine if not given, and without one they are needed."""
    workspace_mb: int | None = Field(default=None, ge=1)
    """TensorRT: memory that a layer may use while it computes."""
    optimization_level: int | None = Field(default=None, ge=0, le=5)
    """TensorRT: how long it looks for fast kernels."""
    timing_cache: str | None = None
    """TensorRT: folder that keeps what was timed, so that the next build is quick and chooses alike."""

    def settings(self) -> dict[str, Any]:
        """What is given, as the backend's `build` takes it."""
        return {name: value for name, value in self.model_dump(exclude={"name"}).items() if value is not None}


class Config(BaseConfig):
    backend: Engine
    """Who builds the engine, and how."""
    parity_images: int = Field(default=32, ge=1)
    """Validation images on which engine and exported file must agree."""
    parity_box_px: float | None = Field(default=None, gt=0)
    """Largest difference of a box edge, in pixels of the original image; by default 0.5 in fp32 and 1 in fp16."""
    parity_score: float | None = Field(default=None, gt=0)
    """Largest difference of a score; by default 0.001 in fp32 and 0.01 in fp16. In bf16 and int8 the kernels of two
    runtimes round differently: unless both limits are given, parity is recorded and AP decides."""


def identity(config: Config) -> dict[str, Any]:
    """What the engine is made for: this machine's device, or the devices that were named. UserError where none can be
    built here."""
    try:
        return backend_class(config.backend.name).made_for(**config.backend.settings())
    except DeployError as error:
        raise UserError(f"build_engine: {error}; or give the stage a target that has it") from error


def check(config: Config, wired: Mapping[str, Any]) -> Iterable[str]:
    """There is such a backend, it builds something, and the file it will be given is one it can build."""
    name, given = config.backend.name, config.backend.settings()
    engines = [one for one in names() if backend_class(one).SUFFIX != ".onnx"]
    if name not in engines:
        wrong = "takes the ONNX file as it is" if name in names() else "is no backend"
        yield f"backend.name: {name} {wrong}{did_you_mean(name, engines)}"
    elif unknown := sorted(set(given) - set(known := build_settings(name))):
        yield f"backend: {name} has no setting {', '.join(unknown)}; it knows {', '.join(known)}"
    else:
        for node in wired.get("model", ()):
            if file := planned_file(node):
                yield from unfit(config.backend, node.name, file)


def unfit(engine: Engine, name: str, file: PlannedFile) -> Iterable[str]:
    """Why an engine cannot be built from the file that stage `name` will give."""
    fixed = engine.name.startswith("tensorrt") or "int8" in (engine.precision, file.precision)
    if fixed and engine.precision != file.precision:
        yield (
            f"backend.precision: {engine.precision}, and stage {name} gives a file in {file.precision}, which no setting "
            f"of a builder changes; set precision: {file.precision} or give another file"
        )
    if engine.name.startswith("tensorrt") and file.int8_for == "onnxruntime":
        yield (
            f"backend: stage {name} quantises to uint8 for ONNX Runtime, and {engine.name} would read it as int8; set "
            f"runtime: tensorrt in stage {name}"
        )
    if engine.name == "tensorrt_rtx" and file.nms == "graph":
        yield f"backend: tensorrt_rtx cannot do the NMS in the file of stage {name}; export one with nms: host"


def run(config: Config, directory: Path, *, model: ExportedModel, data: Dataset) -> ExportedModel:
    """The engine with its sidecar; where this machine can execute it, parity with the file it was built from decides."""
    backend = backend_class(config.backend.name)
    file = directory / f"model{backend.SUFFIX}"
    try:
        made = build_engine(model.path(model.file), file, config.backend.name, **config.backend.settings())
    except DeployError as error:
        raise UserError(f"build_engine: {error}") from error
    logger.info("%s: %s", file.name, made["census"]["sentence"])
    obstacle = backend.obstacle(made["made_for"])
    parity = None
    if obstacle:
        logger.warning("%s was built and not executed here: %s", file.name, obstacle)
    else:
        parity = proven(config, model, data, lambda reference, tolerance: reference.parity(file, tolerance))
    return described(config, file.name, model, made, parity, obstacle)


def work(config: Config, folder: Path, *, model: ExportedModel, data: Dataset) -> list[str]:
    """One task: the engine, and what it detects in the images of the parity."""
    images = image_files(data, config.parity_images)
    settings = {
        "model": f"inputs/models/{model.name}/{model.file}",
        "backend": config.backend.name,
        "file": f"model{backend_class(config.backend.name).SUFFIX}",
        "build": config.backend.settings(),
        "images": [f"inputs/{name}" for name in images],
        "batch_size": BATCH,
    }
    return sent(folder, [Task(model.name, "build", settings)], {**model_files(model), **images})


def take(
    config: Config, directory: Path, folder: Path, target: str, *, model: ExportedModel, data: Dataset
) -> tuple[ExportedModel, dict[str, Any]]:
    """The engine with its sidecar, and parity of what it detected there."""
    results, device = taken(folder)
    came = results[model.name]
    name, made, obstacle = (came.value[key] for key in ("file", "built", "obstacle"))
    if (
        came.files[name].stat().st_size != made["engine_bytes"]
        or digest.of_file(came.files[name]) != made["engine_sha256"]
    ):
        raise UserError(
            f"build_engine: {name} is not the engine that its sidecar describes; build it again on {target}"
        )
    for file in (name, f"{name}.json"):
        shutil.copyfile(came.files[file], directory / file)
    logger.info("%s: %s", name, made["census"]["sentence"])
    parity = None
    if obstacle:
        logger.warning("%s was built and not executed on %s: %s", name, target, obstacle)
    else:
        found = json.loads(came.files[DETECTIONS].read_bytes())
        after, before = ([Detections.from_list(one) for one in found[when]] for when in ("after", "before"))
        parity = proven(
            config, model, data, lambda reference, tolerance: reference.parity_of(after, lambda: before, tolerance)
        )
    return described(config, name, model, made, parity, obstacle), device


def described(
    config: Config,
    file: str,
    model: ExportedModel,
    made: dict[str, Any],
    parity: ParityRecord | None,
    obstacle: str | None,
) -> ExportedModel:
    """The record of an engine: its model's, but for what is its own."""
    own = {
        "file": file,
        "backend": config.backend.name,
        "precision": config.backend.precision,
        "sha256": made["engine_sha256"],
        "bytes": made["engine_bytes"],
        "parity": parity,
        "not_executed": obstacle or "",
        "made_for": made["made_for"],
        "census": made["census"],
        "source": model.key,
    }
    return ExportedModel.model_validate(model.model_dump() | own)


def proven(
    config: Config, model: ExportedModel, data: Dataset, of: Callable[[Reference, Tolerance], Parity]
) -> ParityRecord:
    """Parity of the engine with the file it was built from, on real images. Raises VerdictError where it decides and
    fails."""
    box_px, score = LIMITS.get(config.backend.precision, (None, None))
    box_px, score = config.parity_box_px or box_px, config.parity_score or score
    tolerance = None if box_px is None or score is None else Tolerance(box_px, score)
    images = CocoSplit(data.folder("val"), data.annotations("val")).files[: config.parity_images]
    with open_backend(model.path(model.file), model.backend) as reference:
        compared = Reference(reference, Contract.from_json(json.dumps(model.contract)), images)
        parity = of(compared, tolerance or WATCHED)
    logger.info("parity: %s", parity.sentence)
    if tolerance and not parity.verdict:
        raise VerdictError(f"build_engine: the engine does not detect what {model.file} detects: {parity.sentence}")
    return ParityRecord.of(parity, model.name)
