"""A classification checkpoint in a detector's backbone computes what the classifier computed."""

import pytest
import torch
from torchvision.models import mobilenet_v2, resnet18

from pipeline.errors import UserError
from stages.detection.load import load_backbone


@pytest.mark.parametrize(("name", "network"), [("resnet18", resnet18), ("mobilenet_v2", mobilenet_v2)])
@pytest.mark.parametrize("norm", ["frozen", "batch"])
def test_classification_weights_keep_their_meaning(name, network, norm, build, student_settings, tmp_path):
    torch.manual_seed(0)
    classifier = network(weights=None).eval()
    for module in classifier.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_var.uniform_(1e-6, 1e-3)  # small, where an eps of 0 instead of 1e-5 would show
    torch.save(classifier.state_dict(), tmp_path / "weights.pth")
    detector = build({**student_settings, "backbone": name, "backbone_norm": norm}).eval()
    load_backbone(detector, tmp_path / "weights.pth")
    images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        x = detector.normalise(images)
        if name == "mobilenet_v2":
            wanted = classifier.features(x)
        else:
            x = classifier.maxpool(classifier.relu(classifier.bn1(classifier.conv1(x))))
            wanted = classifier.layer4(classifier.layer3(classifier.layer2(classifier.layer1(x))))
        found = detector.features(images).backbone[-1]
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item())


def test_a_checkpoint_of_another_network_is_refused(build, student_settings, tmp_path):
    torch.save(resnet18(weights=None).state_dict(), tmp_path / "weights.pth")
    detector = build({**student_settings, "backbone": "mobilenet_v2"})
    with pytest.raises(UserError, match="backbone tensors are not in it or have another shape"):
        load_backbone(detector, tmp_path / "weights.pth")
