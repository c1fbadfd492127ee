"""How many training images a second does one core load? Ours against torchvision's reference pipeline, plain Pillow and
Ultralytics' dataset, and against the limit that decoding sets, in one run.

    python benchmarks/loader.py IMAGES ANNOTATIONS [--side 640] [--fitting] [--peer PEER/bin/python] [--out RESULT.json]

All do the same: read, decode, resize to fit a square canvas, pad, give boxes and a uint8 batch of 16; nothing is augmented.
One process, one thread each, no workers; batches of all of them take turns, medians of the rounds. Images a second are by
CPU time, which says more than the clock on the wall where others use the machine too. The decode limit reads and decodes,
and does nothing else; --fitting leaves out the images that would have to be resized, which that limit knows nothing of.
Ultralytics is AGPL-3.0: it runs in an environment that you name, in a process of its own, and is no part of Headstart;
without --peer it is left out, and the result says so.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import version
from itertools import count, cycle, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from torch.utils.data import DataLoader
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from torchvision.transforms import v2

from deploy.image import ImageSpec, decode
from deploy.machine import machine
from stages.data.augment import AugmentConfig, resized
from stages.data.coco import CocoSplit
from stages.data.decode import decode_pixels
from stages.data.loader import training_batches

BATCH = 16
PAD = (114, 114, 114)

# Answers each line on its standard input with the seconds of CPU and of wall clock that its next batch took.
PEER = """
import json, sys, time
import cv2, torch
torch.set_num_threads(1)
cv2.setNumThreads(0)
import ultralytics
from torch.utils.data import DataLoader
from ultralytics.data.dataset import YOLODataset
folder, side, batch = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
dataset = YOLODataset(folder, data={"names": {i: str(i) for i in range(1000)}, "channels": 3}, imgsz=side, augment=False)
loader = DataLoader(dataset, batch_size=batch, collate_fn=YOLODataset.collate_fn)
versions = {"ultralytics": ultralytics.__version__, "opencv": cv2.__version__}
print("READY", json.dumps({"images": len(dataset), "versions": versions}), flush=True)
batches = (found for _ in iter(int, 1) for found in loader)
for _ in sys.stdin:
    cpu, wall = time.process_time(), time.perf_counter()
    next(batches)
    print("READY", json.dumps([time.process_time() - cpu, time.perf_counter() - wall]), flush=True)
"""


class Peer:
    """Ultralytics in its own process, on links to the images and labels written in its format."""

    def __init__(self, python: str, split: CocoSplit, side: int, folder: Path) -> None:
        for name in ("images", "labels"):
            (folder / name).mkdir()
        for index, file in enumerate(split.files):
            (folder / "images" / file.name).symlink_to(file.resolve())
            _, (height, width), boxes_N4, labels_N, _ = split.sample(index, np.empty((0, 0, 3), np.uint8))
            centres_N2, sides_N2 = (boxes_N4[:, :2] + boxes_N4[:, 2:]) / 2, boxes_N4[:, 2:] - boxes_N4[:, :2]
            rows = np.concatenate([centres_N2, sides_N2], 1) / [width, height, width, height]
            lines = (
                f"{label} {' '.join(f'{value:.6f}' for value in row)}"
                for label, row in zip(labels_N, rows, strict=True)
            )
            (folder / "labels" / f"{file.stem}.txt").write_text("\n".join(lines))
        quiet = {"YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false", "YOLO_VERBOSE": "false"}
        command = [python, "-c", PEER, str(folder / "images"), str(side), str(BATCH)]
        environment = os.environ | quiet | {"YOLO_CONFIG_DIR": str(folder), "OMP_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment, cwd=folder)
        self.told = self._answer()
        if self.told["images"] != len(split):
            raise SystemExit(
                f"{python}: Ultralytics took {self.told['images']} of {len(split)} images; not the same work"
            )

    def __call__(self) -> tuple[float, float]:
        assert self.process.stdin is not None
        self.process.stdin.write("again\n")
        self.process.stdin.flush()
        cpu, wall = self._answer()
        return cpu, wall

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("READY "):
                return json.loads(line.removeprefix("READY "))
        raise SystemExit(f"the peer ended with {self.process.wait()}; its words are above")

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def chosen(arguments: Any, spec: ImageSpec, listed: Path) -> CocoSplit:
    """The images that all load, in whole batches; writes their annotations to `listed`."""
    document = json.loads(arguments.annotations.read_text())
    if arguments.fitting:
        sizes = ((image, (image["height"], image["width"])) for image in document["images"])
        document["images"] = [image for image, size in sizes if spec.content_size(*size) == size]
    document["images"] = document["images"][: min(arguments.images_used, len(document["images"])) // BATCH * BATCH]
    kept = {image["id"] for image in document["images"]}
    document["annotations"] = [one for one in document["annotations"] if one["image_id"] in kept]
    listed.write_text(json.dumps(document))
    return CocoSplit(arguments.images, listed)


def torchvision_loader(images: Path, annotations: Path, spec: ImageSpec) -> DataLoader[Any]:
    """CocoDetection and v2 transforms as in torchvision's references/detection, with a fixed canvas."""

    def padded(image: torch.Tensor) -> torch.Tensor:
        right, below = spec.width - image.shape[-1], spec.height - image.shape[-2]
        return functional.pad(image, (0, right, 0, below), value=PAD[0])

    def collate(samples: list[Any]) -> Any:
        return torch.stack([padded(image) for image, _ in samples]), [target for _, target in samples]

    transforms = v2.Compose([v2.ToImage(), v2.Resize(None, max_size=spec.width), v2.ToPureTensor()])
    dataset = CocoDetection(str(images), str(annotations), transforms=transforms)
    wrapped = wrap_dataset_for_transforms_v2(dataset, target_keys=["boxes", "labels", "image_id"])
    return DataLoader(wrapped, batch_size=BATCH, collate_fn=collate)


def contenders(images: Path, annotations: Path, split: CocoSplit, spec: ImageSpec) -> dict[str, Iterator[object]]:
    """Name to what gives a batch each time that it is asked, without end; the two limits first."""
    loader = torchvision_loader(images, annotations, spec)
    parts = [range(first, first + BATCH) for first in range(0, len(split), BATCH)]
    files, sizes = split.files, [tuple(size) for size in split.sizes_N2.tolist()]

    def limit(part: range) -> None:
        for index in part:
            decode_pixels(files[index])

    def resize_limit(part: range) -> None:
        for index in part:
            resized(decode_pixels(files[index]), spec.content_size(*sizes[index]))

    def pillow(part: range) -> None:
        np.stack([spec.prepare(decode(files[index]))[0] for index in part])

    return {
        "decode limit": map(limit, cycle(parts)),
        "decode and resize": map(resize_limit, cycle(parts)),
        "ours": training_batches(split, spec, AugmentConfig(), BATCH, seed=0),
        "torchvision CocoDetection + v2": (batch for _ in count() for batch in loader),
        "plain Pillow": map(pillow, cycle(parts)),
    }


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds of CPU and of wall clock."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def raced(works: dict[str, Callable[[], tuple[float, float]]], rounds: int, steps: int) -> dict[str, list[list[float]]]:
    """Of each the seconds of each round, of CPU and of wall clock. They take turns batch by batch, since processors of
    shared machines change their speed within seconds; the first round, which warms up, is left out."""
    runs: dict[str, list[list[float]]] = {who: [] for who in works}
    for _ in range(rounds + 1):
        spent = {who: [0.0, 0.0] for who in works}
        for _, (who, work) in product(range(steps), works.items()):
            spent[who] = [sum(pair) for pair in zip(spent[who], work(), strict=True)]
        for who, some in runs.items():
            some.append(spent[who])
    return {who: some[1:] for who, some in runs.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("images", type=Path)
    parser.add_argument("annotations", type=Path, help="COCO instances JSON")
    parser.add_argument("--side", type=int, default=640)
    parser.add_argument("--images-used", type=int, default=128, help="that many of them, in whole batches of 16")
    parser.add_argument("--fitting", action="store_true", help="only images that need not be resized")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peer", help="a Python that has ultralytics")
    parser.add_argument("--out", type=Path, help="write the numbers here as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    spec = ImageSpec(arguments.side, arguments.side, PAD)
    with tempfile.TemporaryDirectory() as name:
        listed = Path(name) / "same.json"
        split = chosen(arguments, spec, listed)
        batches = contenders(arguments.images, listed, split, spec)
        works = {who: partial(timed, partial(next, some)) for who, some in batches.items()}
        peer = Peer(arguments.peer, split, arguments.side, Path(name)) if arguments.peer else None
        runs = raced(works | ({"Ultralytics YOLODataset": peer} if peer else {}), arguments.rounds, len(split) // BATCH)
        told = peer.told["versions"] if peer else "not measured: no --peer given"
        if peer:
            peer.close()
    report(runs, split, spec, told, arguments)
    return 0


def report(runs: dict[str, list[list[float]]], split: CocoSplit, spec: ImageSpec, peer: Any, arguments: Any) -> None:
    speed = {
        who: {
            kind: len(split) / statistics.median(one[column] for one in some)
            for column, kind in enumerate(("images_per_cpu_second", "images_per_second"))
        }
        for who, some in runs.items()
    }
    limit = speed["decode limit"]["images_per_cpu_second"]
    # Round by round: what disturbs the machine disturbs neighbours alike.
    shares = {
        who: statistics.median(least[0] / mine[0] for least, mine in zip(runs["decode limit"], some, strict=True))
        for who, some in runs.items()
    }
    resizing = sum(spec.content_size(*size) != tuple(size) for size in split.sizes_N2.tolist())
    print(f"{len(split)} images, {resizing} of them resized, to fit {spec.height} x {spec.width}; Ultralytics: {peer}")
    for who, found in speed.items():
        print(
            f"{who:32}{found['images_per_cpu_second']:9.1f} images a CPU second, {found['images_per_second']:7.1f} a second, "
            f"{100 * shares[who]:5.1f} % of the decode limit"
        )
    if arguments.out:
        options = f"--side {arguments.side} --images-used {arguments.images_used} --rounds {arguments.rounds}"
        options += " --fitting" * arguments.fitting
        made = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": f"benchmarks/loader.py {arguments.images.name} {arguments.annotations.name} {options}",
            "machine": machine(),
            "load": os.getloadavg(),
            "versions": {name: version(name) for name in ("torch", "torchvision", "pillow", "simplejpeg")}
            | {"peer": peer},
            "images": len(split),
            "resized": resizing,
            "decode_limit_images_per_cpu_second": limit,
            "speed": speed,
            "share_of_decode_limit": shares,
            "rounds_seconds_cpu_wall": runs,
        }
        arguments.out.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
