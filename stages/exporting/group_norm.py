"""Group normalisation in nodes that runtimes have kernels for.

ONNX Runtime's CPU has none for GroupNormalization and takes it apart into 25 small nodes. InstanceNormalization over the
groups is the same arithmetic and has one everywhere: measured, a student with 16 such layers is a sixth faster.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper


def with_instance_norm(model: onnx.ModelProto) -> onnx.ModelProto:
    """A file whose group normalisations are instance normalisations of (B, groups, values), then scaled and shifted by
    the same tensors under the same names. The sizes of their inputs, but for the batch, must be static."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    graph = changed.graph
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in onnx.shape_inference.infer_shapes(model).graph.value_info
    }
    stored = {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if node.op_type != "GroupNormalization":
            nodes.append(node)
            continue
        values, scale, shift = node.input
        settings = {one.name: helper.get_attribute_value(one) for one in node.attribute}
        groups, (channels, *size) = settings["num_groups"], shapes[values][1:]
        for name in (scale, shift):  # one tensor serves every level of a pyramid
            stored[name].dims[:] = [channels, *(1 for _ in size)]
        constants = {
            "grouped": np.asarray([0, groups, -1]),
            "one": np.ones(groups, np.float32),
            "zero": np.zeros(groups, np.float32),
            "whole": np.asarray([0, channels, *size]),
        }
        graph.initializer.extend(
            numpy_helper.from_array(array, f"{node.name}/{name}") for name, array in constants.items()
        )
        steps: tuple[tuple[str, tuple[str, ...], str, dict[str, Any]], ...] = (
            ("Reshape", (values, "/grouped"), "/groups", {}),
            ("InstanceNormalization", ("/groups", "/one", "/zero"), "/normal", {"epsilon": settings["epsilon"]}),
            ("Reshape", ("/normal", "/whole"), "/channels", {}),
            ("Mul", ("/channels", scale), "/scaled", {}),
            ("Add", ("/scaled", shift), node.output[0], {}),
        )
        for operation, inputs, output, attributes in steps:
            given, made = (
                [f"{node.name}{one}" if one.startswith("/") else one for one in some] for some in (inputs, [output])
            )
            nodes.append(helper.make_node(operation, given, made, f"{node.name}/{made[0]}", **attributes))
    del graph.node[:]
    graph.node.extend(nodes)
    told = [value for value in graph.value_info if value.name not in stored]  # of what is stored, the shape is stored
    del graph.value_info[:]
    graph.value_info.extend(told)
    return changed
