"""Which student for which budget? Parameters and operations of each at two sizes; with --latency the exported files' time.

    python benchmarks/students.py [--classes 80] [--sizes 320 640] [--latency 30] [--out RESULT.json]

Operations are counted by torch on the meta device (multiply-adds times two, of convolutions and matrix products): no weights
are needed and no time is taken. Latency is that of the float32 files on ONNX Runtime, one thread, the files of one size in
turn on one image, medians of the seconds on the CPU, which a busy machine stretches less than those on the wall; both are
written down. Weights are random and do not decide the time; nothing is said of AP. `tests/test_students.py` holds the table of
docs/methods.md to this.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deploy.contract import Contract
from deploy.image import ImageSpec
from deploy.machine import machine
from deploy.predictor import Predictor
from stages.detection.load import build_detector, parameter_count
from stages.evaluation.flops import inference_flops
from stages.exporting.onnx_file import write_onnx

LIGHT = {"head_kind": "depthwise", "head_convs": 2, "head_kernel": 1, "head_norm": "batch"}
PHONE = {"backbone": "mobilenet_v2", "backbone_norm": "batch"}
STUDENTS: dict[str, dict[str, Any]] = {
    "RetinaNet, ResNet-18": {"name": "retinanet", "backbone": "resnet18"},
    "RetinaNet, ResNet-18, neck 96, head 2 x 96": {
        "name": "retinanet",
        "backbone": "resnet18",
        "neck_channels": 96,
        "head_convs": 2,
        "head_norm": "group",
    },
    "RetinaNet, MobileNetV2, neck 96, light head": {"name": "retinanet", **PHONE, "neck_channels": 96, **LIGHT},
    "FCOS, MobileNetV2, neck 96, light head": {"name": "fcos", **PHONE, "neck_channels": 96, **LIGHT},
    "SSDLite, MobileNetV3": {"name": "ssdlite"},
    "GFL, MobileNetV2, PAN 96, light head": {
        "name": "gfl",
        **PHONE,
        "neck": "pan",
        "neck_channels": 96,
        "extra_levels": 1,
        "bins": 8,
        **LIGHT,
    },
    "GFL, tiny, PAN 64, light head": {
        "name": "gfl",
        "backbone": "tiny",
        "backbone_norm": "batch",
        "neck": "pan",
        "neck_channels": 64,
        "extra_levels": 1,
        "bins": 8,
        **LIGHT,
    },
}


def counted(classes: int, sizes: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Parameters, and operations by size, of each student."""
    found = {}
    for name, settings in STUDENTS.items():
        with torch.device("meta"):
            detector = build_detector(settings, classes)
        flops = {size: inference_flops(detector, size, size) for size in sizes}
        found[name] = {"parameters": parameter_count(detector), "flops": flops}
    return found


def table(found: dict[str, dict[str, Any]]) -> list[str]:
    """The numbers as lines of Markdown: millions of parameters, GFLOPs at each size."""
    sizes = list(next(iter(found.values()))["flops"])
    head = ["student", "parameters, M", *(f"GFLOPs at {size}" for size in sizes)]
    rows = [
        [name, f"{one['parameters'] / 1e6:.2f}", *(f"{one['flops'][size] / 1e9:.2f}" for size in sizes)]
        for name, one in found.items()
    ]
    return ["| " + " | ".join(row) + " |" for row in [head, ["---", *["---:"] * (len(head) - 1)], *rows]]


def timed(classes: int, size: int, runs: int) -> dict[str, dict[str, float]]:
    """Median milliseconds of each student's file, on the CPU and on the wall, after three turns that do not count."""
    names = tuple(f"class {number}" for number in range(classes))
    contract = Contract(ImageSpec(size, size, (0, 0, 0)), names, tuple(range(classes)), 1000)
    image = np.random.default_rng(0).integers(0, 256, (1, size, size, 3), np.uint8)
    found: dict[str, dict[str, list[float]]] = {name: {"cpu": [], "wall": []} for name in STUDENTS}
    with tempfile.TemporaryDirectory() as folder:
        opened = {}
        for number, (name, settings) in enumerate(STUDENTS.items()):
            torch.manual_seed(0)
            file = Path(folder) / f"{number}.onnx"
            write_onnx(build_detector(settings, classes).eval(), size, size, 1000, file)
            contract.write_to_onnx(file)
            opened[name] = Predictor.open(file, threads=1)
        for turn in range(runs + 3):
            for name, predictor in opened.items():
                cpu, wall = time.process_time(), time.perf_counter()
                predictor.infer(image)
                spent = 1e3 * (time.process_time() - cpu), 1e3 * (time.perf_counter() - wall)
                if turn >= 3:
                    found[name]["cpu"].append(spent[0])
                    found[name]["wall"].append(spent[1])
    return {name: {clock: statistics.median(ms) for clock, ms in one.items()} for name, one in found.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--sizes", type=int, nargs="+", default=[320, 640])
    parser.add_argument("--latency", type=int, metavar="RUNS", help="time the exported files, this many turns")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    found = counted(given.classes, given.sizes)
    print("\n".join(table(found)))
    result: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "classes": given.classes,
        "students": {name: {"settings": STUDENTS[name], **one} for name, one in found.items()},
    }
    if given.latency:
        result |= {"machine": machine(), "threads": 1, "runs": given.latency}
        result["median_ms"] = {size: timed(given.classes, size, given.latency) for size in given.sizes}
        print(json.dumps({key: result[key] for key in ("machine", "threads", "runs", "median_ms")}, indent=1))
    if given.out:
        given.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
