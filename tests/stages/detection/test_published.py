"""Files that others published: where they are found, what their names promise, and what is refused."""

import hashlib

import pytest
import torch
from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

from pipeline.errors import UserError
from stages.detection.load import load_published
from stages.detection.published import PublishedFile, read

CLASSES = [f"class {number}" for number in range(10)]


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """An empty current folder, and an empty home of torch."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    hub = tmp_path / "torch" / "hub" / "checkpoints"
    hub.mkdir(parents=True)
    return tmp_path / "here", hub


def test_a_name_is_looked_for_in_weights_and_in_torch_hubs_folder(folders):
    here, hub = folders
    (hub / "a.pth").write_bytes(b"hub")
    assert PublishedFile("a.pth").path == hub / "a.pth"
    (here / "weights").mkdir()
    (here / "weights" / "a.pth").write_bytes(b"weights")
    assert PublishedFile("a.pth").path == here / "weights" / "a.pth"
    (here / "a.pth").write_bytes(b"here")
    assert PublishedFile("a.pth").path == here / "a.pth"
    assert str(PublishedFile("a.pth")) == "a.pth"


def test_torchvisions_own_name_of_weights_means_their_file(folders):
    _, hub = folders
    (hub / "maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth").write_bytes(b"")
    found = PublishedFile("MaskRCNN_ResNet50_FPN_Weights.COCO_V1")
    assert found.path.name == MaskRCNN_ResNet50_FPN_Weights.COCO_V1.url.rpartition("/")[2]


def test_a_path_is_not_looked_for_elsewhere(folders):
    _, hub = folders
    (hub / "a.pth").write_bytes(b"hub")
    with pytest.raises(ValueError, match=r"no file of weights elsewhere/a\.pth"):
        PublishedFile("elsewhere/a.pth")


def test_a_missing_file_of_torchvisions_comes_with_the_command_that_fetches_it(folders):
    with pytest.raises(
        ValueError, match=r"curl -L --create-dirs -o weights/(\S+) https://download\.pytorch\.org/models/\1"
    ):
        PublishedFile("fasterrcnn_resnet50_fpn_coco-258fb6c6.pth")
    with pytest.raises(ValueError, match=r"the nearest name is fasterrcnn_resnet50_fpn_coco-258fb6c6\.pth"):
        PublishedFile("weights/fasterrcnn_resnet50_fpn_coco.pth")


def test_the_hash_in_a_name_is_compared(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "plain.pth")
    content = (tmp_path / "plain.pth").read_bytes()
    right = tmp_path / f"net-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    right.write_bytes(content)
    assert torch.equal(read(right)["a"], torch.ones(2))
    wrong = tmp_path / "net-0123abcd.pth"
    wrong.write_bytes(content)
    with pytest.raises(UserError, match="its sha256 begins with 0123abcd, and it begins with"):
        read(wrong)


def test_what_would_run_code_is_not_opened(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pth")
    with pytest.raises(UserError, match="not a file of tensors and plain values"):
        read(tmp_path / "model.pth")


def test_a_mask_head_is_left_out_and_said(build, teacher_settings, tmp_path, caplog):
    detector = build(teacher_settings)
    state = dict(detector.state_dict())
    state |= {f"roi_heads.mask_head.{k}": v for k, v in MaskRCNNHeads(16, (8, 8), 1).state_dict().items()}
    state |= {f"roi_heads.mask_predictor.{k}": v for k, v in MaskRCNNPredictor(8, 8, 11).state_dict().items()}
    torch.save(state, tmp_path / "mask.pth")
    other = build(teacher_settings)
    torch.nn.init.zeros_(other.roi_heads.box_head.fc6.weight)
    with caplog.at_level("INFO"):
        load_published(other, tmp_path / "mask.pth", CLASSES)
    assert torch.equal(other.roi_heads.box_head.fc6.weight, detector.roi_heads.box_head.fc6.weight)
    assert "8 tensors of the mask head are left out" in caplog.text
    torch.save({**state, "roi_heads.keypoint_head.0.weight": torch.ones(1)}, tmp_path / "keypoints.pth")
    with pytest.raises(UserError, match=r"1 do not belong to FasterRCNN \(roi_heads\.keypoint_head\.0\.weight\)"):
        load_published(other, tmp_path / "keypoints.pth", CLASSES)
