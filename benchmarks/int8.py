"""How much faster is a detector in eight bits? One fixed graph, float32 against uint8 activations, one thread.

    python benchmarks/int8.py [--out RESULT.json] [--size 320] [--runs 30]

A RetinaNet of ResNet-18 (the usual student: pyramid of 256 channels, towers of four convolutions, 20 classes) with random
weights, exported and quantised by the code of the stages. Weights do not decide the time, so none are needed; nothing is
said of AP. Both files run in turn on one image. The seconds are of the CPU, which a busy machine stretches less than those
on the wall; both are written down. Exit code 3 when the ratio of the medians is below 2.5.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch

from deploy.contract import Contract
from deploy.image import ImageSpec
from deploy.machine import int8_instructions, machine
from deploy.predictor import Predictor
from stages.detection.load import build_detector
from stages.exporting.int8 import Quantiser
from stages.exporting.onnx_file import write_onnx

LEAST = 2.5
DETECTOR = {"name": "retinanet", "backbone": "resnet18", "backbone_norm": "frozen", "trainable_layers": 3}
CLASSES = 20


def written(folder: Path, size: int) -> dict[str, Path]:
    """The float file and the quantised one, with a contract inside."""
    torch.manual_seed(0)
    source = folder / "float32.onnx"
    write_onnx(build_detector(DETECTOR, CLASSES).eval(), size, size, 1000, source)
    names = tuple(f"class {number}" for number in range(CLASSES))
    Contract(ImageSpec(size, size, (0, 0, 0)), names, tuple(range(CLASSES)), 1000).write_to_onnx(source)
    quantiser = Quantiser(source, "onnxruntime", False, folder)
    generator = np.random.default_rng(0)
    images = (generator.integers(0, 256, (1, size, size, 3), np.uint8) for _ in range(4))
    quantiser.calibrate(images, "minmax")
    return {"float32": source, "uint8": quantiser.write([layer.name for layer in quantiser.layers])}


def timed(files: dict[str, Path], size: int, runs: int) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of every run after three that do not count, on the CPU and on the wall."""
    image = np.random.default_rng(1).integers(0, 256, (1, size, size, 3), np.uint8)
    opened = {name: Predictor.open(file, threads=1) for name, file in files.items()}
    found: dict[str, dict[str, list[float]]] = {name: {"cpu": [], "wall": []} for name in files}
    for turn in range(runs + 3):
        for name, predictor in opened.items():
            cpu, wall = time.process_time(), time.perf_counter()
            predictor.infer(image)
            spent = 1e3 * (time.process_time() - cpu), 1e3 * (time.perf_counter() - wall)
            if turn >= 3:
                found[name]["cpu"].append(spent[0])
                found[name]["wall"].append(spent[1])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--size", type=int, default=320)
    parser.add_argument("--runs", type=int, default=30)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = written(Path(folder), given.size)
        sizes = {name: file.stat().st_size for name, file in files.items()}
        operators = {name: len(onnx.load(file).graph.node) for name, file in files.items()}
        found = timed(files, given.size, given.runs)
    medians = {name: {clock: statistics.median(ms) for clock, ms in one.items()} for name, one in found.items()}
    ratio = medians["float32"]["cpu"] / medians["uint8"]["cpu"]
    result: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "int8_instructions": list(int8_instructions()),
        "onnxruntime": onnxruntime.__version__,
        "detector": {**DETECTOR, "classes": CLASSES, "size": given.size},
        "threads": 1,
        "runs": given.runs,
        "bytes": sizes,
        "nodes": operators,
        "median_ms": medians,
        "least_ms": {name: {clock: min(ms) for clock, ms in one.items()} for name, one in found.items()},
        "ratio_of_medians": ratio,
        "ratio_of_medians_wall": medians["float32"]["wall"] / medians["uint8"]["wall"],
        "asked": LEAST,
    }
    print(json.dumps(result, indent=1))
    if given.out:
        given.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if ratio >= LEAST else 3


if __name__ == "__main__":
    sys.exit(main())
