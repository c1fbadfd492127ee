"""What belongs to which layer, and what to none."""

import numpy as np
import onnx
import pytest

from pipeline.errors import UserError
from stages.exporting.layers import layers_of, named


def test_a_layer_is_a_weight_its_convolutions_and_what_follows(graph):
    stem, head = layers_of(graph)
    assert (stem.name, stem.convolutions) == ("stem", ("make_stem",))
    assert stem.followers == ("make_stem_out", "make_smaller")
    assert (head.name, head.convolutions) == ("head", ("make_head_fine", "make_head_coarse"))
    assert head.followers == ()  # the decoding belongs to nobody, nor does the normalisation


def test_an_addition_belongs_to_its_later_side(parse):
    """Else a shortcut would drag half of the network along."""
    text = """
    <ir_version: 10, opset_import: ["" : 21]>
    residual (float[1,1,4,4] x) => (float[1,1,4,4] y)
    {
      first = Conv(x, a)
      second = Conv(first, b)
      sum = Add(second, first)
      y = Conv(sum, c)
    }
    """
    first, second, _ = layers_of(parse(text, {name: np.ones((1, 1, 1, 1), np.float32) for name in "abc"}))
    assert (first.followers, second.followers) == ((), ("make_sum",))


def test_layers_of_an_export_carry_the_detectors_names(exported):
    names = [layer.name for layer in layers_of(onnx.load(exported.path(exported.file)))]
    assert names[0] == "backbone.body.stem.0"
    assert {"head.classification_head.cls_logits", "head.regression_head.bbox_reg"} <= set(names)


def test_nodes_of_one_name_are_refused(graph):
    graph.graph.node[1].name = graph.graph.node[0].name
    with pytest.raises(ValueError, match="share a name"):
        layers_of(graph)


def test_a_computed_weight_is_refused(graph):
    next(node for node in graph.graph.node if node.name == "make_stem").input[1] = "normal"
    with pytest.raises(ValueError, match="the weight normal of make_stem is no stored tensor"):
        layers_of(graph)


def test_patterns_name_layers(graph):
    layers = layers_of(graph)
    assert named(["h*"], layers, "export") == ("head",)
    assert named(["head", "s*"], layers, "export") == ("stem", "head")  # in the graph's order
    with pytest.raises(UserError, match="export: no layer haed; did you mean 'head'"):
        named(["haed"], layers, "export")
