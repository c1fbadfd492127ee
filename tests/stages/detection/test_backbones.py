"""A classification checkpoint in a detector's backbone computes what the classifier computed; every family is exported."""

import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from torchvision.models import mobilenet_v2, mobilenet_v3_small, resnet18, shufflenet_v2_x0_5, swin_t
from torchvision.ops import FrozenBatchNorm2d

from pipeline.config import Choice
from pipeline.errors import ConfigError, UserError
from stages.detection.detector import Detector
from stages.detection.load import load_backbone
from stages.exporting.onnx_file import write_onnx

NANODET = Path(__file__).parents[4] / "shared/data/weights/nanodet_m.pth"
HALF = {
    "pixel_mean": [127.5] * 3,
    "pixel_std": [127.5] * 3,
}  # what this small one, and EfficientNet-lite, were trained with
MOBILENET_V4 = "mobilenetv4_conv_small_035"


def resnet(net, x):
    x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
    return net.layer4(net.layer3(net.layer2(net.layer1(x))))


def shufflenet(net, x):
    return net.stage4(net.stage3(net.stage2(net.maxpool(net.conv1(x)))))


def swin(net, x):
    """The layer normalisation behind a stage is fresh, and so does no more than normalise."""
    return torch.nn.functional.layer_norm(net.features(x), (768,)).permute(0, 3, 1, 2)


CLASSIFIERS = {
    "resnet18": (resnet18, resnet),
    "mobilenet_v2": (mobilenet_v2, lambda net, x: net.features(x)),
    "mobilenet_v3_small": (mobilenet_v3_small, lambda net, x: net.features(x)),
    "shufflenet_v2_x0_5": (shufflenet_v2_x0_5, shufflenet),
    "swin_t": (swin_t, swin),
    f"timm/{MOBILENET_V4}": (lambda: timm.create_model(MOBILENET_V4), lambda net, x: net.forward_features(x)),
}


def troubled(network):
    """A network whose statistics are not those of a fresh one."""
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d | FrozenBatchNorm2d):
            module.running_var.uniform_(0.3, 0.6)
            module.running_mean.normal_(0, 0.1)
    return network.eval()


@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize("norm", ["frozen", "batch"])
def test_classification_weights_keep_their_meaning(name, norm, build, student_settings, tmp_path):
    """In double precision, where a lost eps of 1e-5 shows against what float32 weights round."""
    if name == "swin_t" and norm == "batch":
        pytest.skip("a Swin has no batch normalisation: both settings are one network")
    torch.manual_seed(0)
    make, features = CLASSIFIERS[name]
    classifier = troubled(make())
    torch.save(classifier.state_dict(), tmp_path / "weights.pth")
    colours = HALF if "timm" in name else {}
    detector = build({**student_settings, **colours, "backbone": name, "backbone_norm": norm}).eval()
    load_backbone(detector, tmp_path / "weights.pth")
    images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    detector, classifier = detector.double(), classifier.double()
    with torch.no_grad():
        wanted = features(classifier, detector.normalise(images))
        found = detector.features(images).backbone[-1]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())
    assert any(isinstance(one, FrozenBatchNorm2d) for one in detector.modules()) == (
        norm == "frozen" and name != "swin_t"
    )


def test_a_checkpoint_of_another_network_is_refused(build, student_settings, tmp_path):
    torch.save(resnet18(weights=None).state_dict(), tmp_path / "weights.pth")
    detector = build({**student_settings, "backbone": "mobilenet_v2"})
    with pytest.raises(UserError, match="backbone tensors are not in it or have another shape"):
        load_backbone(detector, tmp_path / "weights.pth")


def test_weights_for_other_colours_are_refused_with_what_to_set(build, student_settings, tmp_path):
    settings = {**student_settings, "backbone": "timm/tf_efficientnet_lite0"}
    torch.save(timm.create_model("tf_efficientnet_lite0").state_dict(), tmp_path / "weights.pth")
    with pytest.raises(UserError, match=re.escape("set pixel_mean: [127.5, 127.5, 127.5]")):
        load_backbone(build(settings), tmp_path / "weights.pth")
    load_backbone(build({**settings, **HALF}), tmp_path / "weights.pth")


@pytest.mark.skipif(not NANODET.is_file(), reason="../shared/data/weights/nanodet_m.pth is not beside the checkout")
def test_the_backbone_of_a_real_detector_loads(build, student_settings):
    detector = build({**student_settings, "backbone": "shufflenet_v2_x1_0", "backbone_norm": "batch"})
    load_backbone(detector, NANODET)
    real = torch.load(NANODET, weights_only=True)["state_dict"]
    own = detector.backbone.body.state_dict()
    assert {f"backbone.{key}" for key in own} == {
        key for key in real if key.startswith("backbone.") and ".conv5" not in key
    }
    assert all(torch.equal(value, real[f"backbone.{key}"]) for key, value in own.items() if "num_batches" not in key)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("resnet19", "no backbone 'resnet19'; did you mean 'resnet18'?"),
        ("timm/mobilenetv4_conv_smal", "timm has no mobilenetv4_conv_smal; did you mean 'mobilenetv4_conv_small'?"),
        ("timm/vit_tiny_patch16_224", "have the strides [16, 16, 16]"),
        ({"name": "resnet18", "style": "cafe"}, "backbone.style"),
        (18, "there are: mobilenet, resnet, shufflenet, swin, timm, tiny"),
    ],
)
def test_what_is_no_backbone_is_refused_when_the_config_is_read(given, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        Choice.parse(Detector, {"name": "retinanet", "backbone": given})


def test_settings_say_the_same_when_they_are_read_again():
    first = Choice.parse(Detector, {"name": "retinanet", "backbone": "timm/mobilenetv4_conv_small"})
    assert first.dump()["backbone"] == {"name": "timm", "variant": "mobilenetv4_conv_small"}
    assert Choice.parse(Detector, first.dump()) == first


def test_caffe_style_has_its_stride_in_the_first_convolution(build, student_settings):
    body = build({**student_settings, "backbone": {"name": "resnet50", "style": "caffe"}}).backbone.body
    assert body.layer2[0].conv1.stride == (2, 2)
    assert body.layer2[0].conv2.stride == (1, 1)


@pytest.mark.parametrize("trainable", range(6))
def test_the_last_parts_learn(trainable, build, student_settings):
    body = build({**student_settings, "backbone": "mobilenet_v2", "trainable_layers": trainable}).backbone.body
    learning = {name.partition(".")[0] for name, p in body.named_parameters() if p.requires_grad}
    first = (19, 14, 7, 4, 2, 0)[trainable]
    assert learning == {str(number) for number in range(first, 19)}


EXPORTED = ["mobilenet_v3_small", "shufflenet_v2_x0_5", "timm/mobilenetv4_conv_small_035"]


@pytest.mark.parametrize("name", EXPORTED)
def test_a_family_is_exported_and_every_convolution_is_found(name, build, student_settings, tmp_path):
    detector = build({**student_settings, "backbone": name, "backbone_norm": "frozen"}).eval()
    troubled(detector)
    file = tmp_path / "model.onnx"
    write_onnx(detector, 64, 96, 50, file)
    images = np.random.default_rng(0).integers(0, 256, (1, 64, 96, 3), dtype=np.uint8)
    boxes, scores, _ = onnxruntime.InferenceSession(file).run(None, {"images": images})
    with torch.no_grad():
        wanted = detector(torch.from_numpy(images).permute(0, 3, 1, 2), 50)
    np.testing.assert_allclose(scores, wanted.scores_BN, atol=1e-4)
    # Two scores that differ by rounding may change places; one that is nearly the last may be left out.
    sure = wanted.scores_BN[0] > wanted.scores_BN[0, -1] + 1e-4
    distance = np.abs(boxes[0][:, None] - wanted.boxes_BN4[0].numpy()[None]).max(-1).min(0)
    assert sure.sum() > 25
    assert distance[sure.numpy()].max() < 1e-2
    assert not any(node.op_type == "BatchNormalization" for node in onnx.load(file).graph.node)  # all are folded
