"""A YOLO nano trained by Ultralytics itself, from random weights, for so many minutes: a file to compare students with.

    python benchmarks/ultralytics_nano.py FOLDER --size 128 --minutes 5 --out nano.onnx [--model yolo11n] [--threads 1]

FOLDER holds images/ and annotations/instances_train.json and instances_val.json in COCO's form. Ultralytics' defaults decide
all but the canvas, the batch and the time; its augmentation is its own. The file has a free batch and no NMS. Ultralytics is
AGPL-3.0, and its makers hold that models trained with it are, too: run this in an environment of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

QUIET = {"YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false"}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="yolo11n")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        data = as_yolo(asked.folder.resolve(), Path(scratch))
        made = trained(data, asked, Path(scratch))
        asked.out.write_bytes(made.read_bytes())
    print(f"{asked.out}: {asked.out.stat().st_size:,} bytes", file=sys.stderr)
    return 0


def as_yolo(folder: Path, into: Path) -> Path:
    """The data.yaml of a folder of links and text files with the same boxes; crowds are left out."""
    names: dict[int, str] = {}
    for split in ("train", "val"):
        document = json.loads((folder / "annotations" / f"instances_{split}.json").read_bytes())
        names = {one["id"]: one["name"] for one in sorted(document["categories"], key=lambda one: int(one["id"]))}
        labels = {category: label for label, category in enumerate(names)}
        boxes: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for one in document["annotations"]:
            if not one.get("iscrowd"):
                boxes[one["image_id"]].append(one)
        for part in ("images", "labels"):
            (into / part / split).mkdir(parents=True)
        for image in document["images"]:
            name = Path(image["file_name"])
            (into / "images" / split / name.name).symlink_to(folder / "images" / name)
            lines = [line(one, image, labels) for one in boxes[image["id"]]]
            (into / "labels" / split / f"{name.stem}.txt").write_text("".join(lines))
    data = into / "data.yaml"
    data.write_text(
        json.dumps({"path": str(into), "train": "images/train", "val": "images/val", "names": list(names.values())})
    )
    return data


def line(one: dict[str, Any], image: dict[str, Any], labels: dict[int, int]) -> str:
    """`class cx cy w h`, in shares of the image."""
    x, y, w, h = one["bbox"]
    width, height = image["width"], image["height"]
    shares = ((x + w / 2) / width, (y + h / 2) / height, w / width, h / height)
    return " ".join([str(labels[one["category_id"]]), *(f"{share:.6f}" for share in shares)]) + "\n"


def trained(data: Path, asked: argparse.Namespace, scratch: Path) -> Path:
    """The exported file of the last weights."""
    os.environ.update(QUIET)
    import torch
    from ultralytics import YOLO

    torch.set_num_threads(asked.threads)
    yolo = YOLO(f"{asked.model}.yaml")
    settings = {"imgsz": asked.size, "batch": asked.batch, "device": "cpu", "workers": 0, "seed": 0}
    yolo.train(
        data=str(data),
        time=asked.minutes / 60,
        pretrained=False,
        val=False,
        plots=False,
        **settings,
        project=str(scratch),
    )
    best = YOLO(next(scratch.rglob("last.pt")))
    return Path(best.export(format="onnx", imgsz=asked.size, dynamic=True, simplify=False, device="cpu"))


if __name__ == "__main__":
    raise SystemExit(main())
