"""Real files of other people against an independent decode: the same 12 COCO statistics.

On a few images, so that it is quick; `IMAGES=421 pytest -n0 tests/stages/test_external_real.py` takes all. Some of the files
are AGPL: they are read where they lie, and nothing that is made of them leaves the temporary folder.
"""

import json
import os
from pathlib import Path

import pytest

from stages import dataset, external, validate

from .external_reference import NMS, SYNONYMS, results, statistics

SHARED = Path(__file__).parents[3] / "shared" / "data"
WEIGHTS, DATA = SHARED / "weights", SHARED / "voc20-mix-320"
IMAGES = int(os.environ.get("IMAGES", "12"))
DESCRIBED = {
    "yolo26n_int8": {"input": {"fit": "centre", "colours": "rgb", "divide_by": 255}, "layout": "rows", "nms": "none"},
    "yolov8n_int8": {
        "input": {"fit": "centre", "colours": "rgb", "divide_by": 255},
        "layout": "columns",
        "nms": "host",
    },
    "picodet_s_416": {
        "input": {
            "fit": "stretch",
            "colours": "rgb",
            "divide_by": 255,
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
        },
        "layout": "distributions",
        "nms": "host",
    },
    "yolox_nano": {"input": {"fit": "top_left", "colours": "bgr", "divide_by": 1}, "layout": "grid", "nms": "host"},
}

pytestmark = pytest.mark.skipif(
    not WEIGHTS.is_dir(), reason="no ../shared/data/weights beside the checkout: other people's files"
)


@pytest.fixture(scope="module")
def few(make, tmp_path_factory):
    """The first validation images, and as many training images, of real photographs."""
    folder = tmp_path_factory.mktemp("few")
    source = {"name": "coco"}
    for name in ("train", "val"):
        document = json.loads((DATA / "annotations" / f"instances_{name}.json").read_text())
        document["images"] = document["images"][:IMAGES]
        ids = {one["id"] for one in document["images"]}
        document["annotations"] = [one for one in document["annotations"] if one["image_id"] in ids]
        (folder / f"{name}.json").write_text(json.dumps(document))
        source[name] = {"images": str(DATA / "images"), "annotations": str(folder / f"{name}.json")}
    return make(folder, "data", dataset, {"source": source, "size": 320})


@pytest.mark.parametrize("name", DESCRIBED)
def test_the_statistics_are_those_of_an_independent_decode(make, tmp_path, few, name):
    described = dict(DESCRIBED[name])
    if NMS[name] is not None:
        described["nms_iou"] = NMS[name]
    config = {
        "model": str(WEIGHTS / f"{name}.onnx"),
        "classes": "coco80",
        "rename": SYNONYMS,
        "activation": "none",
        "parity_images": 4,
        **described,
    }
    made = make(tmp_path, "adapted", external, config, data=few)
    accuracy = make(tmp_path, "accuracy", validate, {}, data=few, checkpoints=[], models=[made])
    wanted = statistics(results(name, WEIGHTS, DATA, IMAGES), few.annotations("val"))
    found = [-1.0 if value is None else value for value in accuracy.rows[0].statistics.values()]
    assert wanted[0] > 0.2
    assert found == pytest.approx(wanted, abs=1e-3)
    assert made.contract.get("one_by_one", False) is (made.precision == "int8")
    assert made.precision == ("int8" if "int8" in name else "fp32")
