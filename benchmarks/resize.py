"""What does another image library's resize cost in AP? The same bundle on the same images, scaled to its input by Pillow
with antialias (the contract), and by OpenCV without (INTER_LINEAR) and with averaging (INTER_AREA).

    python benchmarks/resize.py BUNDLE --images DIR --annotations JSON [--out RESULT.json]

Needs opencv-python-headless, in an environment of your own. Every image is decoded by Pillow, so that the resize alone
differs. Paired intervals over images, 95 %. It says which share of the images is scaled, and by how much: where none is,
there is nothing to see.
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deploy.accuracy import Result, evaluate_predictor
from deploy.gain import paired_bootstrap
from deploy.image import Placement
from deploy.machine import machine
from deploy.predictor import Predictor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from PIL import Image


class OpenCv(Predictor):
    """A predictor whose images are scaled by OpenCV; all else is the contract's."""

    interpolation = "INTER_LINEAR"

    def prepare(self, images: Sequence[Image.Image]) -> tuple[NDArray[np.uint8], list[Placement]]:
        import cv2

        spec = self.contract.image
        batch = np.empty((len(images), spec.height, spec.width, 3), np.uint8)
        batch[:] = spec.pad_rgb
        placements = []
        for canvas, image in zip(batch, images, strict=True):
            placement = Placement((image.height, image.width), spec.content_size(image.height, image.width))
            height, width = placement.content
            flag = getattr(cv2, self.interpolation)
            canvas[:height, :width] = cv2.resize(np.asarray(image), (width, height), interpolation=flag)
            placements.append(placement)
        return batch, placements


def scales(predictor: Predictor, images: Path, annotations: Path) -> list[float]:
    """By how much each image is scaled to fit the input; 1 is as it is."""
    spec, found = predictor.contract.image, []
    for image in json.loads(annotations.read_text())["images"]:
        decoded = predictor.decode(images / image["file_name"])
        found.append(spec.content_size(decoded.height, decoded.width)[1] / decoded.width)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--annotations", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="write the numbers here as JSON")
    arguments = parser.parse_args()
    import cv2

    results: dict[str, list[Result]] = {}
    rows: dict[str, Any] = {}
    with Predictor.open(arguments.bundle) as ours:
        factors = scales(ours, arguments.images, arguments.annotations)
        described = {"runtime": ours.backend.identity(), "model_sha256": ours.model.sha256 if ours.model else ""}
        predictors = {"Pillow, antialiased": ours}
        for name in ("INTER_LINEAR", "INTER_AREA"):
            predictors[f"OpenCV, {name}"] = other = OpenCv(ours.backend, ours.contract)
            other.interpolation = name
        for name, predictor in predictors.items():
            accuracy, results[name] = evaluate_predictor(predictor, arguments.images, arguments.annotations)
            rows[name] = accuracy.to_dict()
    reference = next(iter(results))
    print(f"{len(factors)} images, scaled by {min(factors):.3f} to {max(factors):.3f}, median {np.median(factors):.3f}")
    print(f"{'':24}{'AP':>8}{'AP50':>8}{'AP75':>8}{'APs':>8}   against {reference}, 95 %")
    for name, row in rows.items():
        said = ""
        if name != reference:
            gain = paired_bootstrap(results[reference], results[name], arguments.annotations)
            row["against_reference"] = gain.to_dict()
            said = f"{100 * gain.difference:+.2f} AP [{100 * gain.low:+.2f}, {100 * gain.high:+.2f}]"
        shown = "".join(f"{100 * (row[key] or 0):8.2f}" for key in ("ap", "ap50", "ap75", "ap_small"))
        print(f"{name:24}{shown}   {said}")
    if arguments.out:
        made = {
            "command": " ".join(["python", *sys.argv]),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": machine(),
            "opencv": cv2.__version__,
            **described,
            "scales": {"min": min(factors), "median": float(np.median(factors)), "max": max(factors)},
            "rows": rows,
        }
        arguments.out.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
