import pytest

from deploy.census import CONVOLUTION, PRODUCT, Layer, judge, precision_of, take


def layers(*precisions, kind=CONVOLUTION):
    return tuple(Layer(f"conv{index}", kind, precision) for index, precision in enumerate(precisions))


def test_only_weighty_layers_are_judged():
    found = (*layers("fp16", "fp16"), *layers("fp32", "fp32", "fp32", kind="activation"))
    assert judge("fp16", found, "it asks for") == (True, "it asks for 2 in fp16, of 2 convolutions and matrix products")


@pytest.mark.parametrize(("given", "passes"), [(("fp16", "fp32"), True), (("fp16", "fp32", "fp32"), False)])
def test_islands_pass_while_half_is_as_asked(given, passes):
    passed, sentence = judge("fp16", layers(*given), "it asks for")
    assert passed is passes
    assert "1 in fp16" in sentence
    assert ("not in fp16: conv1" in sentence) is passes


def test_nothing_weighty_is_no_pass():
    assert judge("fp32", layers("fp32", kind="activation"), "it asks for")[0] is False


def test_requested_and_built_are_never_mixed():
    asked = take("fp16", layers("fp16", "fp16"), None)
    assert asked.verdict
    assert asked.built is None
    assert asked.sentence.endswith("what was built is not known here")
    assert asked.to_dict()["built"] is None
    fallen = take("fp16", layers("fp16", "fp16"), layers("fp32", "fp32", kind=PRODUCT))
    assert not fallen.verdict
    assert "the ONNX asks for 2 in fp16" in fallen.sentence
    assert "the runtime built 2 in fp32" in fallen.sentence
    assert [one["precision"] for one in fallen.to_dict()["requested"]] == ["fp16", "fp16"]


def test_fused_regions_tell_nothing_and_decide_nothing():
    found = take("fp16", layers("fp16"), layers("unknown", kind="Myelin"))
    assert found.verdict
    assert "1 fused layers only" in found.sentence


def test_the_most_common_precision():
    assert precision_of(layers("fp32", "int8", "int8")) == "int8"
    assert precision_of(()) is None
