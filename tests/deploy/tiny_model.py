"""Tiny ONNX models with the interface of an exported detector, made without torch: what they find can be worked out by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from deploy.contract import Contract
from deploy.image import ImageSpec
from onnx import TensorProto, helper, numpy_helper


def contract(height: int = 64, width: int = 64, candidates: int = 4, **changes: object) -> Contract:
    """A contract of two classes with unusual category ids."""
    settings: dict[str, object] = {
        "image": ImageSpec(height, width, (114, 114, 114)),
        "classes": ("cat", "dog"),
        "category_ids": (17, 18),
        "candidates": candidates,
    }
    return Contract(**(settings | changes))  # type: ignore[arg-type]


def write(path: Path, boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, contract: Contract) -> Path:
    """A model that finds these candidates in every image, with scores scaled by the image's mean brightness / 255.

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
