"""Probes: prepared images and what a detector computes from them, to the last bit.

    python -m stages.evaluation.probes SETTINGS.json WEIGHTS PROBES OUT.json

runs in a fresh process and says whether a weights file alone reproduces what was recorded: nothing that the recording
process held in memory (a hook, a patched method, an assistant) can help it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from deploy.image import decode
from stages.artifacts.dataset import Dataset
from stages.data.coco import CocoSplit
from stages.detection.detector import Detector
from stages.detection.load import load_detector

COUNT = 1000  # candidates compared


@torch.inference_mode()
def outputs(detector: Detector, images_BCHW: Tensor) -> dict[str, Tensor]:
    """Candidates of every image, one image at a time."""
    detector.eval()
    found = [detector(image[None], COUNT) for image in images_BCHW]
    return {
        "boxes": torch.cat([f.boxes_BN4 for f in found]).contiguous(),
        "scores": torch.cat([f.scores_BN for f in found]).contiguous(),
        "labels": torch.cat([f.labels_BN for f in found]).contiguous(),
    }


def record_probes(detector: Detector, data: Dataset, count: int, file: Path) -> None:
    """Write the first `count` validation images, prepared, with the detector's outputs on them."""
    split = CocoSplit(data.folder("val"), data.annotations("val"))
    spec = data.image_spec()
    prepared = [torch.from_numpy(spec.prepare(decode(path))[0]) for path in split.files[:count]]
    images_BCHW = torch.stack(prepared).permute(0, 3, 1, 2).contiguous()
    threads = torch.tensor(torch.get_num_threads())  # they decide the last bit
    save_file({"images": images_BCHW, "threads": threads, **outputs(detector, images_BCHW)}, file)


def replay(settings: dict[str, Any], classes: int, weights: Path, probes: Path, directory: Path) -> dict[str, Any]:
    """Reproduce the probes from a weights file in a fresh process.

    Returns {"probes": how many, "differences": {output: largest difference}, "parameters": count}. Raises RuntimeError with
    the process's words where it fails.
    """
    request, answer = directory / "replay.json", directory / "replayed.json"
    request.write_text(json.dumps({"settings": settings, "classes": classes}))
    command = [
        sys.executable,
        "-P",
        "-m",
        "stages.evaluation.probes",
        str(request),
        str(weights),
        str(probes),
        str(answer),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the fresh process failed:\n{done.stderr.strip()}")
    found: dict[str, Any] = json.loads(answer.read_text())
    request.unlink()
    answer.unlink()
    return found


def _main(request: str, weights: str, probes: str, answer: str) -> None:
    asked = json.loads(Path(request).read_text())
    recorded = load_file(probes)
    torch.set_num_threads(int(recorded["threads"]))
    detector = load_detector(asked["settings"], asked["classes"], Path(weights))
    again = outputs(detector, recorded["images"])
    differences = {name: (again[name].double() - recorded[name].double()).abs().max().item() for name in again}
    parameters = sum(p.numel() for p in detector.parameters())
    found = {"probes": len(recorded["images"]), "differences": differences, "parameters": parameters}
    Path(answer).write_text(json.dumps(found))


if __name__ == "__main__":
    _main(*sys.argv[1:])
