"""Operations of an ONNX graph on one image: multiply-adds times two of convolutions and matrix products.

The same that `stages.evaluation.flops` has torch count of our own detectors.
"""

from __future__ import annotations

from math import prod

import onnx

_CONVOLUTIONS = {"Conv": 1, "ConvInteger": 1, "QLinearConv": 3}  # place of the weight among the inputs
_PRODUCTS = {"MatMul": 1, "MatMulInteger": 1, "QLinearMatMul": 3, "Gemm": 1}


def graph_flops(model: onnx.ModelProto) -> int:
    """Of a graph whose input has any batch, with a batch of one. Raises ValueError where a shape cannot be inferred."""
    one = onnx.ModelProto()
    one.CopyFrom(model)
    for value in one.graph.input:
        value.type.tensor_type.shape.dim[0].dim_value = 1
    for value in one.graph.output:
        value.type.tensor_type.ClearField("shape")
    typed = onnx.shape_inference.infer_shapes(one, data_prop=True).graph
    values = [*typed.value_info, *typed.input, *typed.output]
    shapes = {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in values}
    shapes |= {tensor.name: list(tensor.dims) for tensor in one.graph.initializer}
    total = 0
    for node in one.graph.node:
        if node.op_type not in _CONVOLUTIONS and node.op_type not in _PRODUCTS:
            continue
        made = shapes.get(node.output[0], [])
        if node.op_type in _CONVOLUTIONS:
            each = prod(shapes.get(node.input[_CONVOLUTIONS[node.op_type]], [0])[1:])
        else:
            second = shapes.get(node.input[_PRODUCTS[node.op_type]], [0, 0])
            turned = any(one.name == "transB" and one.i for one in node.attribute)
            each = second[-1] if turned else second[-2] if len(second) > 1 else second[0]
        if not made or not all(made) or not each:
            raise ValueError(f"flops: the shapes of {node.op_type} {node.name} cannot be inferred")
        total += 2 * prod(made) * each
    return total
