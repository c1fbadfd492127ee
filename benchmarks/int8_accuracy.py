"""What does a trained detector lose in eight bits? The quantize stage, then AP of both files on the validation images.

    python benchmarks/int8_accuracy.py DATASET EXPORTED [--aware EXPORTED] [--out RESULT.json] [--set max_ap_drop=0.005 ...]

DATASET and EXPORTED are folders of a store, as runs/latest/data and runs/latest/onnx. The interval is that of a paired
bootstrap over the validation images, which calibration and the choice of layers never saw.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import onnxruntime
import yaml

from deploy.accuracy import evaluate_predictor
from deploy.gain import paired_bootstrap
from deploy.machine import machine
from deploy.predictor import Predictor
from stages import quantize
from stages.artifacts.dataset import Dataset
from stages.artifacts.exported_model import ExportedModel


def measured(data: Dataset, source: ExportedModel, settings: dict[str, Any]) -> dict[str, Any]:
    """Quantise into a folder that is thrown away, and compare both files on the validation images."""
    with tempfile.TemporaryDirectory() as folder:
        made = quantize.run(quantize.Config(**settings), Path(folder), model=source, data=data).placed(Path(folder))
        found = []
        for model in (source, made):
            with Predictor.open(model.path(model.file)) as predictor:
                images, annotations = data.folder("val"), data.annotations("val")
                found.append(evaluate_predictor(predictor, images, annotations, batch_size=8))
    (before, first), (after, second) = found
    gain = paired_bootstrap(first, second, data.annotations("val"))
    sizes = ("ap", "ap50", "ap_small", "ap_medium", "ap_large")
    assert made.quantisation is not None
    return {
        "lost_on_validation": {
            "ap": -gain.difference,
            "low": -gain.high,
            "high": -gain.low,
            **{name: getattr(gain, name) for name in ("confidence", "samples", "images", "seed")},
        },
        "float32": {name: getattr(before, name) for name in sizes},
        "int8": {name: getattr(after, name) for name in sizes},
        "bytes": {"float32": source.bytes, "int8": made.bytes},
        "float_layers": made.float_layers,
        "detections": made.parity.sentence,
        "quantisation": made.quantisation.model_dump(mode="json"),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("exported", type=Path)
    parser.add_argument("--aware", type=Path, help="another exported model, whose training was aware of the rounding")
    parser.add_argument("--set", nargs="*", default=[], help="settings of the quantize stage, NAME=VALUE")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    data = Dataset.load(given.data)
    settings = {name: yaml.safe_load(value) for name, _, value in (one.partition("=") for one in given.set)}
    folders = {"plain": given.exported} | ({"aware": given.aware} if given.aware else {})
    result = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "onnxruntime": onnxruntime.__version__,
        "settings": quantize.Config(**settings).model_dump(mode="json"),
        "images": {"train": data.train.image_count, "val": data.val.image_count},
        **{name: measured(data, ExportedModel.load(folder), settings) for name, folder in folders.items()},
    }
    print(json.dumps(result, indent=1))
    if given.out:
        given.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
