"""A small graph with the shape of an exported detector, and a tiny student that was trained and exported."""

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from stages import export, train

GRAPH = """
<ir_version: 10, opset_import: ["" : 21]>
detector (uint8[B,8,8,3] images) => (float[B,4,64] fine, float[B,4,16] coarse)
{
  pixels = Cast<to=1>(images)
  channels_first = Transpose<perm=[0,3,1,2]>(pixels)
  normal = Sub(channels_first, mean)
  stem = Conv<pads=[1,1,1,1]>(normal, detector_stem_weight, detector_stem_bias)
  stem_out = Relu(stem)
  smaller = MaxPool<kernel_shape=[2,2], strides=[2,2]>(stem_out)
  head_fine = Conv<pads=[1,1,1,1]>(stem_out, detector_head_weight, detector_head_bias)
  head_coarse = Conv<pads=[1,1,1,1]>(smaller, detector_head_weight, detector_head_bias)
  flat_fine = Reshape(head_fine, fine_shape)
  flat_coarse = Reshape(head_coarse, coarse_shape)
  fine = Mul(flat_fine, stride)
  coarse = Mul(flat_coarse, stride)
}
"""


def parsed(text, stored):
    """A model from ONNX's text form; nodes are named by what they make, `_` in the detector's tensors stands for `.`."""
    model = onnx.parser.parse_model(text)
    for node in model.graph.node:
        node.name = f"make_{node.output[0]}"
        node.input[:] = [name.replace("_", ".") if name.startswith("detector_") else name for name in node.input]
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in stored.items())
    onnx.checker.check_model(model, full_check=True)
    return model


@pytest.fixture(scope="session")
def parse():
    """The function `parsed`."""
    return parsed


@pytest.fixture
def graph():
    """normalise -> stem, relu, pool -> one head on two levels -> decode."""
    generator = np.random.default_rng(0)
    stored = {
        "mean": np.full((1, 3, 1, 1), 120, np.float32),
        "detector.stem.weight": generator.normal(0, 0.1, (6, 3, 3, 3)).astype(np.float32),
        "detector.stem.bias": generator.normal(0, 1, 6).astype(np.float32),
        "detector.head.weight": generator.normal(0, 0.1, (4, 6, 3, 3)).astype(np.float32),
        "detector.head.bias": generator.normal(0, 1, 4).astype(np.float32),
        "fine_shape": np.asarray([0, 4, 64]),
        "coarse_shape": np.asarray([0, 4, 16]),
        "stride": np.asarray(8, np.float32),
    }
    return parsed(GRAPH, stored)


@pytest.fixture(scope="session")
def images():
    """Four images for that graph."""
    return np.random.default_rng(1).integers(0, 256, (4, 8, 8, 3), np.uint8)


@pytest.fixture(scope="session")
def student(make, tmp_path_factory, digits, student_settings):
    """A tiny RetinaNet that has learnt a little."""
    config = {
        "detector": student_settings,
        "steps": 60,
        "batch_size": 8,
        "device": "cpu",
        "optimizer": {"name": "adamw", "lr": 4e-3, "warmup": 5},
    }
    return make(tmp_path_factory.mktemp("trained"), "student", train, config, data=digits)


@pytest.fixture(scope="session")
def exported(make, tmp_path_factory, digits, student):
    """The same as ONNX in float32."""
    config = {"parity_images": 4, "score_threshold": 0.1}
    return make(tmp_path_factory.mktemp("exported"), "onnx", export, config, checkpoint=student, data=digits)
