"""What does the runtime cost over the work itself? File to detections, against its parts and against a bare script.

    python benchmarks/end_to_end.py BUNDLE IMAGE... [--threads 1] [--calls 300] [--out RESULT.json]

The parts are Pillow's decoding, Pillow's resizing into the canvas, the session's `run`, and threshold with NMS; timed one
by one, in the same process, on the same session, in turn with ours. The bare script is the same lines in one piece. All
three must find the same boxes. Exit code 3 when ours takes more than 1.05 x the sum of the parts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from deploy.conditions import Sampler, doubts, summary
from deploy.machine import machine
from deploy.postprocess import suppress
from deploy.predictor import Predictor

LIMIT = 1.05
PARTS = ("decode", "resize", "session", "nms")


class Bare:
    """The work without the runtime: no checks, no types, no errors that help."""

    def __init__(self, predictor: Predictor) -> None:
        self.session = predictor.backend._session  # type: ignore[attr-defined]  # the same one, not another like it
        self.contract = predictor.contract
        self.outputs = list(self.contract.output_names)

    def decode(self, file: Path) -> Image.Image:
        return ImageOps.exif_transpose(Image.open(file)).convert("RGB")

    def resize(self, image: Image.Image) -> tuple[Any, float, int, int]:
        spec = self.contract.image
        scale = min(spec.height / image.height, spec.width / image.width)
        h, w = int(image.height * scale + 0.5), int(image.width * scale + 0.5)
        canvas = np.full((1, spec.height, spec.width, 3), spec.pad_rgb, np.uint8)
        canvas[0, :h, :w] = np.asarray(image.resize((w, h), Image.Resampling.BILINEAR))
        return canvas, scale, h, w

    def run(self, canvas: Any) -> list[Any]:
        return self.session.run(self.outputs, {"images": canvas})

    def nms(self, outputs: list[Any], scale: float, h: int, w: int) -> Any:
        boxes, scores, labels = (array[0] for array in outputs)
        keep = scores > self.contract.score_threshold
        boxes, scores, labels = (
            np.clip(boxes[keep], 0, np.asarray([w, h, w, h], np.float32)),
            scores[keep],
            labels[keep],
        )
        best = np.argsort(-scores, kind="stable")
        boxes = boxes[best]
        if self.contract.nms == "host":
            boxes = boxes[suppress(boxes, labels[best], self.contract.nms_iou, self.contract.max_detections)]
        return boxes / scale

    def __call__(self, file: Path) -> Any:
        canvas, scale, h, w = self.resize(self.decode(file))
        return self.nms(self.run(canvas), scale, h, w)

    def timed(self, file: Path) -> list[float]:
        """Seconds of each part."""
        clock = time.perf_counter
        t0 = clock()
        image = self.decode(file)
        t1 = clock()
        canvas, scale, h, w = self.resize(image)
        t2 = clock()
        outputs = self.run(canvas)
        t3 = clock()
        self.nms(outputs, scale, h, w)
        return [t1 - t0, t2 - t1, t3 - t2, clock() - t3]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("bundle", type=Path, help="a bundle's folder, or an exported file with its contract")
    parser.add_argument("images", type=Path, nargs="+")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--calls", type=int, default=300)
    parser.add_argument("--out", type=Path, help="write the numbers here as JSON")
    arguments = parser.parse_args()
    with Predictor.open(arguments.bundle, threads=arguments.threads) as predictor:
        found = measure(predictor, arguments.images, arguments.calls)
    print(f"{'ms, median':24}{found['ours_ms']:9.3f}   ours, file to detections")
    for name, milliseconds in found["parts_ms"].items():
        print(f"{'':24}{milliseconds:9.3f}   {name}")
    print(
        f"{'':24}{found['sum_ms']:9.3f}   sum of the parts, call by call: ours is {found['over_sum']:.3f} x (at most {LIMIT})"
    )
    bare = f"{found['over_bare']:.3f} x, in CPU time {found['over_bare_cpu']:.3f} x"
    print(f"{'':24}{found['bare_ms']:9.3f}   bare script: ours is {bare}")
    print("unreliable: " + "; ".join(found["doubts"]) if found["doubts"] else "quiet")
    if arguments.out:
        # By names, not paths: where files lay on one machine means nothing on another.
        options = f"--threads {arguments.threads} --calls {arguments.calls}"
        command = f"benchmarks/end_to_end.py {arguments.bundle.name} {len(arguments.images)} images {options}"
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        head = {"date": now, "command": command, "machine": machine(), "load": os.getloadavg()}
        arguments.out.write_text(json.dumps(head | found, indent=1) + "\n", encoding="utf-8")
    return 3 if found["over_sum"] > LIMIT else 0


def measure(predictor: Predictor, files: list[Path], calls: int) -> dict[str, Any]:
    """All three, in turn, so that what disturbs the machine disturbs all of them; medians over the calls."""
    bare = Bare(predictor)
    for file in files:
        (ours,) = predictor([file])
        np.testing.assert_allclose(bare(file), ours.boxes_xyxy, atol=0.6)  # ours scales each axis by its own rounding
    seconds: dict[str, list[float]] = {"ours": [], "bare": []}
    cpu: dict[str, list[float]] = {"ours": [], "bare": []}
    parts: list[list[float]] = []
    with Sampler(gpu=False) as sampler:
        for index in range(calls):
            file = files[index % len(files)]
            for name, function in (("ours", lambda one: predictor([one])), ("bare", bare)):
                start, computing = time.perf_counter(), time.process_time()
                function(file)
                seconds[name].append(time.perf_counter() - start)
                cpu[name].append(time.process_time() - computing)
            parts.append(bare.timed(file))
    columns = {
        name: 1e3 * statistics.median(column) for name, column in zip(PARTS, zip(*parts, strict=True), strict=True)
    }
    ours, script = (1e3 * statistics.median(seconds[name]) for name in ("ours", "bare"))
    total = 1e3 * statistics.median(map(sum, parts))
    return {
        "ours_ms": ours,
        "parts_ms": columns,
        "sum_ms": total,
        "bare_ms": script,
        "over_sum": ours / total,
        "over_bare": ours / script,
        "over_bare_cpu": statistics.median(cpu["ours"]) / statistics.median(cpu["bare"]),
        "calls": calls,
        "images": len(files),
        "backend": predictor.backend.identity(),
        "conditions": summary(sampler.samples),
        "doubts": doubts(sampler.samples),
    }


if __name__ == "__main__":
    sys.exit(main())
