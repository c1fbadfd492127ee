"""Our runtime against Ultralytics' predictor: files of equal FLOPs, the same images, one thread each, file to detections.

    python -m venv PEER && PEER/bin/pip install ultralytics onnx onnxruntime
    python benchmarks/peers.py MODEL.onnx IMAGE... --peer PEER/bin/python [--out RESULT.json]

MODEL is a file that Headstart exported. The peer is a YOLO nano with random weights, exported by Ultralytics at the size
whose file has the most nearly equal FLOPs, by one count for both. Ultralytics is AGPL-3.0: it runs in an environment that
you name and in processes of its own, and is no part of Headstart. Ours needs numpy, Pillow, onnxruntime, and onnx to count.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import onnx

from deploy.machine import machine

ROOT = Path(__file__).parents[1]
SIDES = range(64, 1281, 32)  # a YOLO's strides
QUIET = {"YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false", "YOLO_VERBOSE": "false"}

# Each prints milliseconds of every call as JSON, after a tenth as many that do not count, and the mean CPU time of a call,
# of all threads: on a busy machine it says more than the clock on the wall.
OURS = """
import json, sys, time
from deploy.predictor import Predictor
model, calls, *files = sys.argv[1:]
calls, times, found = int(calls), [], 0
with Predictor.open(model, threads=1) as predictor:
    for index in range(-(calls // 10), calls):
        if index == 0:
            computing = time.process_time()
        start = time.perf_counter()
        (detections,) = predictor([files[index % len(files)]])
        if index >= 0:
            times.append(1e3 * (time.perf_counter() - start))
            found += len(detections)
computed = 1e3 * (time.process_time() - computing) / calls
print(json.dumps({"one by one": times, "cpu": {"one by one": computed}, "detections": found}))
"""
THEIRS = """
import json, sys, tempfile, time
import onnxruntime, torch
torch.set_num_threads(1)
session = onnxruntime.InferenceSession
def single(path, sess_options=None, **settings):
    options = sess_options or onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return session(path, options, **settings)
onnxruntime.InferenceSession = single
from ultralytics import YOLO
model, height, width, calls, *files = sys.argv[1:]
calls = int(calls)
settings = dict(imgsz=[int(height), int(width)], conf=0.3, iou=0.5, max_det=100, device="cpu", verbose=False)
yolo = YOLO(model, task="detect")
times, found = [], 0
for index in range(-(calls // 10), calls):
    if index == 0:
        computing = time.process_time()
    start = time.perf_counter()
    (result,) = yolo.predict(files[index % len(files)], **settings)
    if index >= 0:
        times.append(1e3 * (time.perf_counter() - start))
        found += len(result)
computed = {"one by one": 1e3 * (time.process_time() - computing) / calls}
with tempfile.NamedTemporaryFile("w", suffix=".txt") as listed:  # a list of files would be one batch
    listed.write("\\n".join(files[index % len(files)] for index in range(calls)))
    listed.flush()
    stream, streamed = yolo.predict(listed.name, stream=True, batch=1, **settings), []
    next(stream)
    computing = time.process_time()
    for _ in range(calls - 1):
        start = time.perf_counter()
        next(stream)
        streamed.append(1e3 * (time.perf_counter() - start))
computed["stream"] = 1e3 * (time.process_time() - computing) / (calls - 1)
print(json.dumps({"one by one": times, "stream": streamed, "cpu": computed, "detections": found}))
"""
EXPORT = """
import sys
from pathlib import Path
from ultralytics import YOLO
name, height, width, into = sys.argv[1:]
made = YOLO(name).export(format="onnx", imgsz=[int(height), int(width)], simplify=False, device="cpu", verbose=False)
Path(made).rename(into)
"""
VERSIONS = """
import json
from importlib.metadata import distributions
names = ("ultralytics", "torch", "onnxruntime", "opencv-python", "opencv-python-headless")
print(json.dumps({one.name: one.version for one in distributions() if one.name in names}))
"""


def flops(file: Path) -> int:
    """Multiply-adds times two of an ONNX file's convolutions and matrix products on one image."""
    graph = onnx.shape_inference.infer_shapes(onnx.load(file), data_prop=True).graph
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in [*graph.input, *graph.output, *graph.value_info]
    } | {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    total = 0
    for node in graph.node:
        if node.op_type not in ("Conv", "ConvTranspose", "MatMul", "Gemm"):
            continue
        first, second, made = (shapes.get(name, []) for name in (*node.input[:2], node.output[0]))
        made = [made[0] or 1, *made[1:]] if made else made  # the batch, where it is free
        if not made or not second or 0 in made or 0 in second:
            raise SystemExit(
                f"{file}: {node.op_type} {node.name} has no known shape {made}, {second}; it cannot be counted"
            )
        if node.op_type == "MatMul":
            total += 2 * math.prod(made) * first[-1]
        elif node.op_type == "Gemm":
            total += 2 * math.prod(made) * first[1]
        else:  # weights (out, in / groups, height, width); transposed ones are applied at each place of the input
            places = made if node.op_type == "Conv" else first
            total += 2 * math.prod(places[2:]) * math.prod(second)
    return total


def equal_size(python: str, name: str, wanted: int, folder: Path) -> tuple[Path, tuple[int, int], int]:
    """The peer's file, its (height, width) and FLOPs: of all sizes, at most twice as wide as high, the nearest."""
    probe = exported(python, name, (320, 320), folder)
    each = flops(probe) / (320 * 320)  # of a pixel: nearly all of it is convolution
    sizes = [(height, width) for height in SIDES for width in SIDES if height <= width <= 2 * height]
    size = min(sizes, key=lambda one: (abs(each * one[0] * one[1] - wanted), one[1] - one[0]))
    file = exported(python, name, size, folder)
    return file, size, flops(file)


def exported(python: str, name: str, size: tuple[int, int], folder: Path) -> Path:
    into = folder / f"{size[0]}x{size[1]}.onnx"
    if not into.exists():
        command = [python, "-c", EXPORT, name, str(size[0]), str(size[1]), str(into)]
        run(command, folder, cwd=folder)
    return into


def run(command: list[str], folder: Path, cwd: Path | None = None) -> str:
    environment = os.environ | QUIET | {"OMP_NUM_THREADS": "1", "YOLO_CONFIG_DIR": str(folder)}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, check=False)
    if done.returncode:
        raise SystemExit(f"{command[0]}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    return done.stdout.strip().rpartition("\n")[2]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path, help="an ONNX file that Headstart exported")
    parser.add_argument("images", type=Path, nargs="+")
    parser.add_argument("--peer", required=True, help="a Python that has ultralytics, onnx and onnxruntime")
    parser.add_argument("--peer-model", default="yolo11n.yaml", help="default: %(default)s, random weights")
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the numbers here as JSON")
    arguments = parser.parse_args()
    files = [str(file.resolve()) for file in arguments.images]
    with tempfile.TemporaryDirectory() as name:
        scratch, wanted = Path(name), flops(arguments.model)
        peer, (height, width), theirs = equal_size(arguments.peer, arguments.peer_model, wanted, scratch)
        commands = {
            "ours": [sys.executable, "-c", OURS, str(arguments.model.resolve()), str(arguments.calls), *files],
            "ultralytics": [
                *(arguments.peer, "-c", THEIRS, str(peer), str(height), str(width), str(arguments.calls)),
                *files,
            ],
        }
        runs: dict[str, list[dict[str, Any]]] = {who: [] for who in commands}
        for _ in range(arguments.repeats):
            for who, command in commands.items():
                runs[who].append(json.loads(run(command, scratch)))
        versions = json.loads(run([arguments.peer, "-c", VERSIONS], scratch))
    found = {
        "flops": {"ours": wanted, "ultralytics": theirs},
        "peer": {"model": arguments.peer_model, "height": height, "width": width, "versions": versions},
        "medians_ms": medians(runs),
        "cpu_ms": {
            who: {how: [round(one["cpu"][how], 4) for one in some] for how in some[0]["cpu"]}
            for who, some in runs.items()
        },
        "detections": {who: [one["detections"] for one in some] for who, some in runs.items()},
    }
    report(found, arguments)
    return 0


def medians(runs: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, list[float]]]:
    """Who, how it was called: the median of each repeat."""
    return {
        who: {
            how: [round(statistics.median(one[how]), 4) for one in some]
            for how in some[0]
            if isinstance(some[0][how], list)
        }
        for who, some in runs.items()
    }


def report(found: dict[str, Any], arguments: argparse.Namespace) -> None:
    wall, cpu = (
        {(who, how): statistics.median(values) for who, one in found[name].items() for how, values in one.items()}
        for name in ("medians_ms", "cpu_ms")
    )
    ours = "ours", "one by one"
    others = [one for one in wall if one != ours]
    found["times_faster"] = {how: wall[who, how] / wall[ours] for who, how in others}
    found["times_less_cpu"] = {how: cpu[who, how] / cpu[ours] for who, how in others}
    print(f"{'median of the repeats':24}{'ms':>9}{'':9}{'CPU ms':>9}{'':9}{'GFLOP':>8}")
    for who, how in wall:
        ratios = [f"{one[who, how]:9.2f}{one[who, how] / one[ours]:7.2f} x" for one in (wall, cpu)]
        print(f"{who:12} {how:11}{''.join(ratios)}{found['flops'][who] / 1e9:8.3f}")
    if arguments.out:
        # By names, not paths: where files lay on one machine means nothing on another.
        options = f"--calls {arguments.calls} --repeats {arguments.repeats}"
        command = f"benchmarks/peers.py {arguments.model.name} {len(arguments.images)} images {options}"
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        head = {"date": now, "command": command, "machine": machine(), "load": os.getloadavg()}
        arguments.out.write_text(json.dumps(head | found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
