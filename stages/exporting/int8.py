"""A float32 export with its layers in eight bits, by ONNX Runtime's quantizer, as one of two kinds of runtime wants it.

    onnxruntime  activations uint8 with a zero point, weights int8 stored, bias int32: what CPUs multiply fast
    tensorrt     all int8 around zero, weights as float with quantise-dequantise pairs, bias float: what its parser takes

One file cannot serve both: TensorRT reads uint8 as int8 and says so only in a warning, and refuses an int32 bias. What
is before and behind the layers (normalisation, decoding, top-k) computes in float32: eight bits of coordinates are no boxes.
For ONNX Runtime the result of a convolution is rounded where no activation follows, too, logits and offsets of boxes with
it: its integer convolution has no other output. For TensorRT those stay in float.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from pipeline.errors import VerdictError
from stages.artifacts.exported_model import Int8Runtime
from stages.exporting.layers import layers_of, nodes_of

Calibration = Literal["minmax", "entropy", "percentile"]
_METHODS = {"minmax": "MinMax", "entropy": "Entropy", "percentile": "Percentile"}
# Of a histogram with as many bins as there are steps, as is the default, entropy cuts nothing off.
BINS = {"entropy": {"num_bins": 1024}}
# What is quantised in a layer; anything else computes in float between two pairs. Additions and poolings in eight bits
# made a RetinaNet-R18 no faster, and an addition loses what its two sides do not share.
_OPERATORS = {
    "onnxruntime": ("Conv", "Relu", "Clip"),
    "tensorrt": ("Conv",),
}
_OPTIONS: dict[str, dict[str, Any]] = {
    "onnxruntime": {},
    "tensorrt": {
        "ActivationSymmetric": True,
        "WeightSymmetric": True,
        "AddQDQPairToWeight": True,
        "DedicatedQDQPair": True,
        "QuantizeBias": False,
        # A convolution's result goes into an activation or a decoder that wants its precision; its reader quantises it.
        "OpTypesToExcludeOutputQuantization": ["Conv"],
    },
}


class _Reader:
    """One batch by the name of its input, as the calibrator's CalibrationDataReader gives it."""

    def __init__(self, batch: dict[str, NDArray[np.uint8]]) -> None:
        self.left = iter([batch])

    def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
        return next(self.left, None)


class Quantiser:
    """Writes a float32 export with any of its layers in eight bits; `scratch` is a folder for what is made on the way."""

    def __init__(self, source: Path, runtime: Int8Runtime, reduce_range: bool, scratch: Path) -> None:
        self.source, self.runtime, self.reduce_range, self.scratch = source, runtime, reduce_range, scratch
        # The quantizer warns of a model whose types it has to infer.
        self.model = onnx.shape_inference.infer_shapes(onnx.load(source))
        self.metadata = {entry.key: entry.value for entry in self.model.metadata_props}
        self.layers = layers_of(self.model)
        self.ranges: Any = None  # TensorsData: tensor to its range

    def calibrate(self, batches: Iterable[NDArray[np.uint8]], calibration: Calibration) -> None:
        """Learn the range of every tensor that may be quantised from uint8 images (B, H, W, 3)."""
        from onnxruntime.quantization import CalibrationMethod, create_calibrator

        calibrator = create_calibrator(
            self.source,
            _OPERATORS[self.runtime],
            augmented_model_path=str(self.scratch / "calibrated.onnx"),
            calibrate_method=CalibrationMethod[_METHODS[calibration]],
            extra_options={"symmetric": self.runtime == "tensorrt", **BINS.get(calibration, {})},
        )
        name = self.model.graph.input[0].name
        for batch in batches:  # one call each: until a call ends, every value of its images stays in memory
            calibrator.collect_data(_Reader({name: batch}))
        self.ranges = calibrator.compute_data()

    def write(self, chosen: Collection[str]) -> Path:
        """A file in the scratch folder with the layers of these names in eight bits; the next one overwrites it.

        Raises VerdictError where it is not what the runtime takes.
        """
        from onnxruntime.quantization import QDQQuantizer, QuantType

        assert self.ranges is not None, "calibrate first"
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        quantizer = QDQQuantizer(
            model,
            per_channel=True,
            reduce_range=self.reduce_range,
            weight_qType=QuantType.QInt8,
            activation_qType=QuantType.QUInt8 if self.runtime == "onnxruntime" else QuantType.QInt8,
            tensors_range=self.ranges,
            nodes_to_quantize=list(nodes_of(self.layers, list(chosen))),
            nodes_to_exclude=[],
            op_types_to_quantize=_OPERATORS[self.runtime],
            extra_options=_OPTIONS[self.runtime],
        )
        quantizer.quantize_model()
        quantizer.model.topological_sort()
        made: onnx.ModelProto = quantizer.model.model
        if self.runtime == "tensorrt" and (wrong := list(unfit_for_tensorrt(made))):
            raise VerdictError(f"quantize: not a file for TensorRT: {', '.join(wrong[:5])}")
        onnx.helper.set_model_props(made, self.metadata)
        file = self.scratch / "attempt.onnx"
        onnx.save(made, file)
        return file


def unfit_for_tensorrt(model: onnx.ModelProto) -> Iterator[str]:
    """Quantising nodes that TensorRT would refuse, or read as other numbers with no more than a warning."""
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        zero = stored.get(node.input[2]) if len(node.input) > 2 else None
        if zero is None or zero.data_type != TensorProto.INT8:
            yield f"{node.name} is not int8"
        elif numpy_helper.to_array(zero).any():
            yield f"{node.name} has a zero point"
