"""Tiny ONNX models with the interface of an exported detector, made without torch.

What they find can be worked out by hand.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from deploy.contract import Contract
from deploy.detections import Detections
from deploy.digest import digest
from deploy.image import ImageSpec
from deploy.manifest import Model
from deploy.predictor import Predictor
from deploy.release import Sample, write

# The second box repeats the first in its class; the last one hangs over the lower edge.
BOXES = np.asarray([[10, 10, 30, 30], [11, 11, 31, 31], [11, 11, 31, 31], [40, 40, 60, 70]], np.float32)
SCORES = np.asarray([0.9, 0.8, 0.7, 0.6], np.float32)
LABELS = np.asarray([0, 0, 1, 1])


def make_contract(**changes: object) -> Contract:
    """A contract of two classes with unusual category ids; 64 x 64 input padded with white."""
    settings: dict[str, object] = {
        "image": ImageSpec(64, 64, (255, 255, 255)),
        "classes": ("cat", "dog"),
        "category_ids": (17, 18),
        "candidates": 4,
    }
    return Contract(**(settings | changes))


def write_model(path: Path, boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, contract: Contract) -> Path:
    """A model that finds these candidates in every image, with scores scaled by the input's mean brightness / 255.

    A white image gives the scores as they are; so the output depends on the pixels and on the padding.
    """

    def constant(name: str, array: np.ndarray) -> onnx.TensorProto:
        return numpy_helper.from_array(array, name)

    count = len(scores)
    spec = contract.image
    nodes = [
        helper.make_node("Cast", ["images"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["float", "axes"], ["mean"], keepdims=0),
        helper.make_node("Div", ["mean", "full"], ["brightness"]),
        helper.make_node("Unsqueeze", ["brightness", "one"], ["brightness_B1"]),
        helper.make_node("Mul", ["brightness_B1", "scores_1N"], ["scores"]),
        helper.make_node("Shape", ["brightness"], ["batch"]),
        helper.make_node("Concat", ["batch", "count_4"], ["boxes_shape"], axis=0),
        helper.make_node("Expand", ["boxes_1N4", "boxes_shape"], ["boxes"]),
        helper.make_node("Concat", ["batch", "count"], ["labels_shape"], axis=0),
        helper.make_node("Expand", ["labels_1N", "labels_shape"], ["labels"]),
    ]
    constants = [
        constant("axes", np.asarray([1, 2, 3])),
        constant("full", np.asarray(255, np.float32)),
        constant("one", np.asarray([1])),
        constant("scores_1N", scores.astype(np.float32)[None]),
        constant("boxes_1N4", boxes.astype(np.float32)[None]),
        constant("labels_1N", labels.astype(np.int64)[None]),
        constant("count_4", np.asarray([count, 4])),
        constant("count", np.asarray([count])),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", spec.height, spec.width, 3])],
        [
            helper.make_tensor_value_info("boxes", TensorProto.FLOAT, ["batch", count, 4]),
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", count]),
            helper.make_tensor_value_info("labels", TensorProto.INT64, ["batch", count]),
        ],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    contract.write_to_onnx(path)
    return path


def write_convolution(path: Path, precision: str, contract: Contract) -> Path:
    """The tiny model, but brightness comes from a convolution that averages, in fp32, fp16, int8 (signed, around zero) or
    uint8: what a white image gives is the same in all."""
    model = onnx.load(write_model(path, BOXES, SCORES, LABELS, contract))
    graph = model.graph
    weight = np.full((8, 3, 4, 4), 1 / 48, np.float32)
    half = precision == "fp16"
    kind, nodes = np.float16 if half else np.float32, []
    constants = {"scale_255": np.asarray(1 / 255, np.float32), "weight": weight.astype(kind)}
    nodes.append(helper.make_node("Transpose", ["float"], ["float_BCHW"], perm=[0, 3, 1, 2]))
    nodes.append(helper.make_node("Mul", ["float_BCHW", "scale_255"], ["input"]))
    read, kernel = "input", "weight"
    if half:
        nodes.append(helper.make_node("Cast", ["input"], ["input_half"], to=TensorProto.FLOAT16))
        read = "input_half"
    elif precision in ("int8", "uint8"):
        signed = precision == "int8"
        constants |= {
            "step": np.asarray(1 / (127 if signed else 255), np.float32),
            "zero": np.asarray(0, np.int8 if signed else np.uint8),
            "kernel_step": np.full(8, 1 / 48 / 127, np.float32),
            "kernel_zero": np.zeros(8, np.int8),
            "kernel_int8": np.full(weight.shape, 127, np.int8),
        }
        del constants["weight"]
        nodes.append(helper.make_node("QuantizeLinear", ["input", "step", "zero"], ["input_q"], name="quantise"))
        nodes.append(helper.make_node("DequantizeLinear", ["input_q", "step", "zero"], ["input_dq"], name="dequantise"))
        scales = ["kernel_int8", "kernel_step", "kernel_zero"]
        nodes.append(helper.make_node("DequantizeLinear", scales, ["kernel"], name="kernel_dequantise", axis=0))
        read, kernel = "input_dq", "kernel"
    nodes.append(helper.make_node("Conv", [read, kernel], ["averages"], name="average", strides=[4, 4]))
    if half:
        nodes.append(helper.make_node("Cast", ["averages"], ["averages_float"], to=TensorProto.FLOAT))
    nodes.append(
        helper.make_node("ReduceMean", ["averages_float" if half else "averages", "axes"], ["brightness"], keepdims=0)
    )
    cast, *rest = [node for node in graph.node if node.op_type not in ("ReduceMean", "Div")]
    del graph.node[:]
    graph.node.extend([cast, *nodes, *rest])
    graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in constants.items())
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return path


def make_detections(*rows: tuple[list[float], float, int]) -> Detections:
    """Detections from (box_xyxy, score, label)."""
    return Detections.from_list([{"box_xyxy": box, "score": score, "label": label} for box, score, label in rows])


def write_image(path: Path, colour: object = "white", size: tuple[int, int] = (64, 64)) -> Path:
    """An image of one colour; size is (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def write_annotations(path: Path, boxes: list[tuple[int, int, list[float]]], images: int, **changes: object) -> Path:
    """COCO annotations of cat (17) and dog (18) from (image id, category id, xywh); images are 1.png, 2.png, ..."""
    dataset = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 64, "height": 64} for i in range(1, images + 1)],
        "categories": [{"id": 17, "name": "cat"}, {"id": 18, "name": "dog"}],
        "annotations": [
            {"id": i, "image_id": image, "category_id": category, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
            for i, (image, category, box) in enumerate(boxes, 1)
        ],
    }
    path.write_text(json.dumps(dataset | changes))
    return path


@pytest.fixture
def contract() -> Contract:
    return make_contract()


@pytest.fixture
def new_contract() -> Callable[..., Contract]:
    return make_contract


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A file that finds a cat and two dogs in a white image."""
    return write_model(tmp_path / "tiny.onnx", BOXES, SCORES, LABELS, make_contract())


@pytest.fixture
def new_model() -> Callable[..., Path]:
    """Writes the tiny model with another contract."""
    return lambda path, contract: write_model(path, BOXES, SCORES, LABELS, contract)


@pytest.fixture
def new_convolution(tmp_path: Path) -> Callable[[str], Path]:
    """Writes the model with a convolution in a precision."""
    return lambda precision: write_convolution(tmp_path / f"{precision}.onnx", precision, make_contract())


@pytest.fixture
def detections() -> Callable[..., Detections]:
    return make_detections


@pytest.fixture
def white(tmp_path: Path) -> Path:
    return write_image(tmp_path / "white.png")


@pytest.fixture
def new_image() -> Callable[..., Path]:
    return write_image


@pytest.fixture
def new_annotations() -> Callable[..., Path]:
    return write_annotations


def make_entry(path: Path, **changes: object) -> tuple[Path, Model]:
    """A model file with what a bundle says of it: float32 of ONNX Runtime, AP 0.5, never timed."""
    settings: dict[str, object] = {
        "file": "model.onnx",
        "sha256": digest(path)["sha256"],
        "backend": "onnxruntime",
        "precision": "fp32",
        "contract": make_contract(),
        "accuracy": {"statistics": {"ap": 0.5}},
    }
    return path, Model(**(settings | changes))  # type: ignore[arg-type]


@pytest.fixture
def entry() -> Callable[..., tuple[Path, Model]]:
    return make_entry


def make_timing(milliseconds: float, device: str, provider: str = "CPUExecutionProvider", **changes: object) -> dict:
    """A row of latency, as the benchmark stage writes it."""
    return {
        "steps": {"end_to_end": {"p50": milliseconds, "mean": 2 * milliseconds}},
        "runtime": {"provider": provider, "device": device},
        "machine": {"cpu": device},
        "reliable": True,
    } | changes


@pytest.fixture
def timing() -> Callable[..., dict]:
    return make_timing


RELEASE = {"name": "tiny", "provenance": {"commit": "none"}, "licence": "Apache-2.0"}


@pytest.fixture
def release() -> dict[str, object]:
    return dict(RELEASE)


@pytest.fixture
def bundle(tmp_path: Path, model: Path) -> Path:
    """A released bundle with a sample: a white JPEG of 128 x 100 pixels."""
    image = write_image(tmp_path / "sample.jpg", size=(128, 100))
    with Predictor.open(model) as predictor:
        sample = Sample.take(image, {"model.onnx": predictor})
    write(tmp_path / "bundle", [make_entry(model)], RELEASE, "# Tiny\n", sample)
    return tmp_path / "bundle"
