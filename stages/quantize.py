"""An exported model in eight bits: calibrated on training images, with its most sensitive layers in float until AP holds."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import onnx
from pydantic import Field

from deploy.accuracy import Result
from deploy.contract import Contract
from deploy.gain import Gain, paired_bootstrap
from deploy.machine import cpu_model, int8_instructions
from pipeline.config import BaseConfig
from pipeline.errors import UserError, VerdictError
from pipeline.log import logger, progress
from stages.artifacts.dataset import Dataset
from stages.artifacts.exported_model import ExportedModel, Int8Runtime, LayerCost, Quantisation
from stages.exporting.calibration import annotations_of, batches, set_apart
from stages.exporting.held_out import HeldOut, told
from stages.exporting.int8 import Calibration, Quantiser
from stages.exporting.planned import planned_file
from stages.exporting.search import disagreement, fewest
from stages.exporting.tracing import traced

CODE = ("deploy.backends.onnxruntime",)  # reached by name at run time


class Config(BaseConfig):
    runtime: Int8Runtime = "onnxruntime"
    """Whom the file is for: onnxruntime (uint8 activations, fast on CPUs) or tensorrt (int8 around zero)."""
    images: int = Field(default=128, ge=1)
    """Training images that give the ranges of values; none is a validation image."""
    calibration: Calibration = "minmax"
    """How values become ranges: the extremes, or by entropy or percentile, which cut outliers off."""
    held_out: int = Field(default=200, ge=1)
    """Other training images, on which layers are chosen and the loss of AP is measured."""
    sensitivity_images: int = Field(default=16, ge=1)
    """The first of the held-out images, on which each layer is tried alone."""
    seed: int = Field(default=0, ge=0)
    """Decides which training images."""
    max_ap_drop: float = Field(default=0.005, ge=0, le=1)
    """The budget: largest loss of AP on the held-out images; a file that loses more fails the stage."""
    max_float_layers: int = Field(default=8, ge=0)
    """Most layers that may remain in float to keep the budget."""
    reduce_range: bool = False
    """Seven bits for weights: for x86 CPUs without VNNI, where products of eight saturate."""


def check(config: Config, wired: Mapping[str, Any]) -> Iterable[str]:
    """The file to quantise will be one in float32."""
    for node in wired.get("model", ()):
        if node.uses == "build_engine":
            yield f"model: stage {node.name} gives an engine; give the file that it is built from: needs: {{model: ...}}"
        if (file := planned_file(node)) and file.precision != "fp32":
            yield f"model: stage {node.name} gives a file in {file.precision}; give the one in fp32: needs: {{model: ...}}"


def run(config: Config, directory: Path, *, model: ExportedModel, data: Dataset) -> ExportedModel:
    """Quantise; validation images are read once, to prove that none of them is used."""
    if model.precision != "fp32" or model.backend != "onnxruntime":
        raise UserError(
            f"quantize: {model.name} is {model.precision} for {model.backend}; give the fp32 export: needs: {{model: ...}}"
        )
    source, contract = model.path(model.file), Contract.from_json(json.dumps(model.contract))
    apart = set_apart(data, config.images, config.held_out, config.seed)
    apart.write(directory / "calibration.json")
    annotations_of(apart.held_out, data, directory / "held_out.json")
    judge = HeldOut(tuple(one.file for one in apart.held_out), data.folder("train"), directory / "held_out.json")
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        quantiser = Quantiser(source, config.runtime, config.reduce_range, Path(scratch))
        quantiser.calibrate(batches(apart.calibration, contract.image), config.calibration)
        costs = sensitivities(quantiser, judge, config.sensitivity_images)
        file = directory / "model.onnx"
        kept, gain = within_budget(config, quantiser, judge, costs, file)
    lost = -gain.difference
    contract.write_to_onnx(file)
    onnx.checker.check_model(str(file), full_check=True)
    initialisers, constants = traced(onnx.load(file), onnx.load(source), "quantize")
    parity = judge.found_again(source, file, contract, model.name)
    logger.info("int8: %.2f AP lost on %d held-out images; %s", 100 * lost, config.held_out, parity.sentence)
    logger.info("most sensitive: %s; in float: %s", told(list(costs)), told(kept) or "none")
    return model.model_copy(
        update={
            "file": file.name,
            "precision": "int8",
            "float_layers": kept,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
            "bytes": file.stat().st_size,
            "parity": parity,
            "initialisers": initialisers,
            "constants": constants,
            "source": model.key,
            "quantisation": Quantisation(
                runtime=config.runtime,
                calibration=config.calibration,
                images=len(apart.calibration),
                images_sha256=apart.sha256,
                validation_images=apart.compared_with,
                left_out=apart.left_out,
                held_out=len(apart.held_out),
                ap_before=gain.ap_a,
                ap_after=gain.ap_b,
                ap_drop_low=-gain.high,
                ap_drop_high=-gain.low,
                max_ap_drop=config.max_ap_drop,
                layers=tuple(
                    LayerCost(layer=name, disagreement=cost, kept=name in kept) for name, cost in costs.items()
                ),
                cpu=cpu_model(),
                instructions=int8_instructions(),
            ),
        }
    )


def sensitivities(quantiser: Quantiser, judge: HeldOut, images: int) -> dict[str, float]:
    """Layer to what it alone in eight bits does to the detections; the most sensitive first."""
    reference = judge.detections(quantiser.source, images)
    found = {}
    with progress("sensitivity", len(quantiser.layers), "layer") as advance:
        for layer in quantiser.layers:
            found[layer.name] = disagreement(reference, judge.detections(quantiser.write([layer.name]), images))
            advance(1)
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def within_budget(
    config: Config, quantiser: Quantiser, judge: HeldOut, ranked: dict[str, float], file: Path
) -> tuple[tuple[str, ...], Gain]:
    """Write the file with the fewest of the most sensitive layers in float that keeps the budget; those, and the change of
    AP with its interval. Raises VerdictError where none does."""
    before, reference = judge.accuracy(quantiser.source)
    tried: dict[tuple[str, ...], tuple[float, list[Result]]] = {}

    def passes(kept: tuple[str, ...]) -> bool:
        after, results = judge.accuracy(quantiser.write([name for name in ranked if name not in kept]))
        tried[kept] = before - after, results
        logger.info("%d layers in float: %.2f AP lost of %.2f", len(kept), 100 * (before - after), 100 * before)
        return before - after <= config.max_ap_drop

    # Not all of them: a file without a layer in eight bits would keep any budget.
    kept = fewest(list(ranked), passes, min(config.max_float_layers, len(ranked) - 1))
    if kept is None:
        best = min(tried, key=lambda names: tried[names][0])
        raise VerdictError(
            f"quantize: {100 * tried[best][0]:.2f} AP are lost on {config.held_out} held-out images with {len(best)} layers in "
            f"float ({told(best)}), {100 * config.max_ap_drop:g} allowed; allow more max_float_layers, calibrate otherwise, "
            "or train for it with the stage quantize_aware"
        )
    quantiser.write([name for name in ranked if name not in kept]).replace(file)
    return kept, paired_bootstrap(reference, tried[kept][1], judge.annotations)
