"""A dense detector as an ONNX file: uint8 NHWC images in, the best decoded candidates out."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor, nn

from pipeline.errors import VerdictError
from stages.detection.detector import Detector
from stages.exporting.fold import folded
from stages.exporting.global_mean import with_global_means
from stages.exporting.group_norm import with_instance_norm

INPUT = "images"
OUTPUTS = ("boxes", "scores", "labels")
OPSET = 21  # the first with a group normalisation over any number of channels


class Graph(nn.Module):
    """What is traced. The cast comes first: TensorRT-RTX cannot transpose uint8."""

    def __init__(self, detector: Detector, count: int) -> None:
        super().__init__()
        self.detector = detector
        self.count = count

    def forward(self, images_BHWC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # Contiguous, for channels-last strides make torch write an average pooling with index arithmetic behind it.
        found = self.detector(images_BHWC.float().permute(0, 3, 1, 2).contiguous(), self.count)
        return found.boxes_BN4, found.scores_BN, found.labels_BN


def write_onnx(detector: Detector, height: int, width: int, count: int, file: Path) -> tuple[int, int]:
    """Export and check; returns how many learnt tensors of the detector the file holds, and how many constants.

    Raises VerdictError where the batch came out static, where ONNX's own checks fail, or where the file holds numbers
    that are not the detector's.
    """
    images_BHWC = torch.zeros((2, height, width, 3), dtype=torch.uint8)  # two: a batch of one would be traced as static
    model = folded(detector, images_BHWC.permute(0, 3, 1, 2))
    with_global_means(model)
    graph = Graph(model, count).eval()
    graph(images_BHWC)  # makes the anchors of this canvas before tracing, so that they are constants
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                graph,
                (images_BHWC,),
                dynamo=True,
                dynamic_shapes={"images_BHWC": {0: torch.export.Dim("batch", min=1, max=4096)}},
                input_names=[INPUT],
                output_names=list(OUTPUTS),
                opset_version=OPSET,
                verbose=False,
            )
    finally:
        exporter.setLevel(level)
    assert program is not None
    program.save(file, include_initializers=True, external_data=False)
    onnx.save(with_instance_norm(onnx.load(file)), file)
    written = onnx.shape_inference.infer_shapes(onnx.load(file), check_type=True, strict_mode=True)
    try:
        onnx.checker.check_model(str(file), full_check=True)
    except onnx.checker.ValidationError as problem:
        raise VerdictError(f"export: the ONNX file is not valid: {problem}") from problem
    _assert_dynamic(written)
    return trace_initialisers(written, model, images_BHWC)


def _assert_dynamic(model: onnx.ModelProto) -> None:
    values = [*model.graph.input, *model.graph.output]
    static = [v.name for v in values if not v.type.tensor_type.shape.dim[0].dim_param]
    if static:
        raise VerdictError(f"export: the batch of {static} is static; a detector step turned a size into a number")


def trace_initialisers(written: onnx.ModelProto, model: Detector, images_BHWC: Tensor) -> tuple[int, int]:
    """Count the file's initialisers (and constant nodes): learnt tensors of the (folded) detector, and constants, which
    are geometry of its anchors or carry nothing learnt: integers of shapes, factors of resizing, single numbers, fills.

    Raises VerdictError naming those that are none of these.
    """
    learnt = {content_of(tensor.detach().cpu().numpy()) for tensor in model.state_dict().values()}
    known = {content_of(buffer.cpu().numpy()) for buffer in model.buffers()}
    with torch.no_grad():
        anchors = model.predict(model.features(images_BHWC.permute(0, 3, 1, 2))).anchors.boxes_A4
    sizes, corners = anchors[:, 2:] - anchors[:, :2], anchors[:, :2]
    for column in torch.cat([sizes, corners + 0.5 * sizes, anchors], 1).unbind(1):
        known.add(content_of(column.cpu().numpy()))
    # As they are, and as the sides by which distances from a point are scaled (FCOS).
    known |= {content_of(boxes.contiguous().cpu().numpy()) for boxes in (anchors, sizes.repeat(1, 2))}
    foreign, traced, constants = [], 0, 0
    factors = {node.input[2] for node in written.graph.node if node.op_type == "Resize" and len(node.input) > 2}
    attributes = [a for node in written.graph.node if node.op_type == "Constant" for a in node.attribute]
    for tensor in [*written.graph.initializer, *(a.t for a in attributes if a.HasField("t"))]:
        array = numpy_helper.to_array(tensor)
        if content_of(array) in learnt:
            traced += 1
        elif tensor.name in factors or says_nothing(array) or content_of(array) in known:
            constants += 1
        else:
            foreign.append(f"{tensor.name} {list(array.shape)}")
    if foreign:
        raise VerdictError(
            f"export: {len(foreign)} initialisers of the ONNX file are not the student's: {', '.join(foreign[:5])}"
        )
    return traced, constants


def says_nothing(array: NDArray[Any]) -> bool:
    """Shapes and axes (up to eight integers), and fills of one value."""
    if array.dtype.kind in "iub" and array.size <= 8:
        return True
    return array.size == 0 or bool((array == array.flat[0]).all())


def content_of(array: NDArray[Any]) -> tuple[str, bytes]:
    """Values whatever the shape: exporters add and drop axes of length one."""
    return array.dtype.str, np.ascontiguousarray(array).tobytes()
