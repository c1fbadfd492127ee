"""What does `deploy predict` cost over a bare script that does the same work? From process start to result, and in
memory.

    python benchmarks/predict.py [--bundle BUNDLE --image IMAGE] [--out RESULT.json]

The bare script imports numpy, Pillow and ONNX Runtime, and nothing else that is not in them. Both run in turn; medians
are compared. Without a bundle a small one is made, so that start-up is most of the time. Exit code 3 when a ratio is
above 1.2.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

LIMIT = 1.2
# An installed package is there as bytecode: pip compiles it, or the first run does, which is not counted here.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}

BARE = """
import json, os, sys
import numpy as np
import onnxruntime
from PIL import Image, ImageOps

model, file = sys.argv[1:]
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = len(os.sched_getaffinity(0))
session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
contract = json.loads(session.get_modelmeta().custom_metadata_map["headstart.contract"])
height, width = contract["image"]["height"], contract["image"]["width"]
image = ImageOps.exif_transpose(Image.open(file)).convert("RGB")
scale = min(height / image.height, width / image.width)
h, w = int(image.height * scale + .5), int(image.width * scale + .5)
canvas = np.full((1, height, width, 3), contract["image"]["pad_rgb"], np.uint8)
canvas[0, :h, :w] = np.asarray(image.resize((w, h), Image.Resampling.BILINEAR))
boxes, scores, labels = (array[0] for array in session.run(["boxes", "scores", "labels"], {"images": canvas}))
keep = scores > contract["score_threshold"]
boxes, scores, labels = boxes[keep], scores[keep], labels[keep]
boxes = np.clip(boxes, 0, np.asarray([w, h, w, h], np.float32))
area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
order, found = np.argsort(-scores, kind="stable"), []
while len(order) and len(found) < contract["max_detections"]:
    best, rest = order[0], order[1:]
    found.append(best)
    low, high = np.maximum(boxes[best, :2], boxes[rest, :2]), np.minimum(boxes[best, 2:], boxes[rest, 2:])
    inter = np.maximum(high - low, 0).prod(axis=1)
    iou = inter / (area[best] + area[rest] - inter)
    order = rest[(iou <= contract["nms_iou"]) | (labels[rest] != labels[best])]
rows = [{"box_xyxy": (boxes[i] / scale).tolist(), "score": float(scores[i]), "label": int(labels[i]),
         "class": contract["classes"][labels[i]]} for i in found]
print(json.dumps([{"image": file, "detections": rows}]))
"""

MAKE = """
import sys
from pathlib import Path
import numpy as np, onnx
from PIL import Image
from onnx import TensorProto, helper, numpy_helper
from deploy import release
from deploy.digest import digest
from deploy.contract import Contract
from deploy.image import ImageSpec
from deploy.manifest import Model

directory = Path(sys.argv[1])
rng = np.random.default_rng(0)
corner, size = rng.uniform(0, 280, (1, 1000, 2)), rng.uniform(10, 40, (1, 1000, 2))
constants = {
    "boxes_1N4": np.concatenate([corner, corner + size], axis=2).astype(np.float32),
    "scores_1N": np.sort(rng.uniform(0, 1, (1, 1000)).astype(np.float32))[:, ::-1].copy(),
    "labels_1N": rng.integers(0, 10, (1, 1000)),
    "axes": np.asarray([1, 2, 3]), "zero": np.asarray(0, np.float32), "one": np.asarray([1]),
    "boxes_tail": np.asarray([1000, 4]), "tail": np.asarray([1000]),
}
nodes = [
    helper.make_node("Cast", ["images"], ["float"], to=TensorProto.FLOAT),
    helper.make_node("ReduceMean", ["float", "axes"], ["mean"], keepdims=0),
    helper.make_node("Mul", ["mean", "zero"], ["nothing"]),
    helper.make_node("Unsqueeze", ["nothing", "one"], ["nothing_B1"]),
    helper.make_node("Add", ["scores_1N", "nothing_B1"], ["scores"]),
    helper.make_node("Shape", ["mean"], ["batch"]),
    helper.make_node("Concat", ["batch", "boxes_tail"], ["boxes_shape"], axis=0),
    helper.make_node("Expand", ["boxes_1N4", "boxes_shape"], ["boxes"]),
    helper.make_node("Concat", ["batch", "tail"], ["labels_shape"], axis=0),
    helper.make_node("Expand", ["labels_1N", "labels_shape"], ["labels"]),
]
value = helper.make_tensor_value_info
graph = helper.make_graph(
    nodes, "made",
    [value("images", TensorProto.UINT8, ["batch", 320, 320, 3])],
    [value("boxes", TensorProto.FLOAT, ["batch", 1000, 4]), value("scores", TensorProto.FLOAT, ["batch", 1000]),
     value("labels", TensorProto.INT64, ["batch", 1000])],
    [numpy_helper.from_array(array, name) for name, array in constants.items()],
)
onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), directory / "made.onnx")
classes = tuple(f"class {index}" for index in range(10))
contract = Contract(image=ImageSpec(320, 320, (114, 114, 114)), classes=classes, category_ids=tuple(range(10)),
                    candidates=1000, score_threshold=0.9)
contract.write_to_onnx(directory / "made.onnx")
Image.fromarray(rng.integers(0, 255, (640, 640, 3), np.uint8)).save(directory / "image.jpg")
given = dict.fromkeys(("name", "provenance", "licence"))
made = directory / "made.onnx"
model = Model("model.onnx", digest(made)["sha256"], "onnxruntime", "fp32", contract)
release.write(directory / "bundle", [(made, model)], given, "made for a benchmark")
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--bundle", type=Path, help="default: one is made, which needs the onnx package")
    parser.add_argument("--image", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the numbers here as JSON")
    arguments = parser.parse_args()
    if (arguments.bundle is None) != (arguments.image is None):
        parser.error("--bundle and --image belong together")
    with tempfile.TemporaryDirectory() as scratch:
        bundle, image = arguments.bundle, arguments.image
        if bundle is None:
            # In a process of its own: what the measuring process holds would count as its children's peak memory.
            subprocess.run([sys.executable, "-c", MAKE, scratch], check=True)
            bundle, image = Path(scratch, "bundle"), Path(scratch, "image.jpg")
        deploy = Path(sys.executable).with_name("deploy")
        commands = {
            "bare script": [sys.executable, "-c", BARE, str(bundle / "model.onnx"), str(image)],
            "deploy predict": [str(deploy), "predict", "--json", str(bundle), str(image)],
        }
        same = {name: [len(row["detections"]) for row in run(command)[3]] for name, command in commands.items()}
        runs: dict[str, list[tuple[float, float, float]]] = {name: [] for name in commands}
        for _ in range(arguments.repeats):
            for name, command in commands.items():
                runs[name].append(run(command)[:3])
    return report(runs, same, arguments.out)


def run(command: list[str]) -> tuple[float, float, float, Any]:
    """Seconds from start to exit, peak MiB, seconds of CPU time and the parsed output of one run."""
    start = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdout=output, env=ENVIRONMENT)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{command[0]}: exit code {process.returncode}")
        output.seek(0)
        return seconds, usage.ru_maxrss / 1024, usage.ru_utime + usage.ru_stime, json.loads(output.read())


def report(runs: dict[str, list[tuple[float, float, float]]], same: dict[str, list[int]], out: Path | None) -> int:
    medians = {
        name: [statistics.median(column) for column in zip(*values, strict=True)] for name, values in runs.items()
    }
    bare, ours = medians["bare script"], medians["deploy predict"]
    ratios = {"time": ours[0] / bare[0], "memory": ours[1] / bare[1]}
    print(f"{'':16}{'seconds':>9}{'MiB':>8}{'CPU s':>8}   detections")
    for name, (seconds, mebibytes, computed) in medians.items():
        print(f"{name:16}{seconds:9.3f}{mebibytes:8.1f}{computed:8.3f}   {same[name]}")
    # CPU time is told beside: on a busy machine it says more, and no limit is set on it.
    print(f"{'ratio':16}{ratios['time']:9.2f}{ratios['memory']:8.2f}{ours[2] / bare[2]:8.2f}   (at most {LIMIT})")
    if out:
        measured = {
            name: [{"seconds": s, "mebibytes": m, "cpu_seconds": c} for s, m, c in values]
            for name, values in runs.items()
        }
        machine = {"platform": platform.platform(), "cores": len(os.sched_getaffinity(0)), "load": os.getloadavg()}
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        numbers = {"date": now, "machine": machine, "command": sys.argv, "runs": measured, "ratios": ratios}
        out.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    return 3 if max(ratios.values()) > LIMIT or len(set(map(tuple, same.values()))) > 1 else 0


if __name__ == "__main__":
    sys.exit(main())
