"""With equal random weights our YOLO computes what Ultralytics' own model computes: maps, boxes, scores and losses.

No published checkpoint can be had where these tests run. The package is an extra under AGPL-3.0: without it they skip.
"""

import hashlib
import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from pipeline.errors import UserError
from stages.detection import ultralytics_network
from stages.detection.detectors.yolo import YOLO
from stages.detection.load import load_published
from stages.detection.records import Targets

if find_spec("ultralytics") is None:
    pytest.skip("pip install 'headstart[ultralytics]' (AGPL-3.0)", allow_module_level=True)

YOLOV5 = Path(__file__).parents[4] / "shared" / "data" / "weights" / "yolov5n.pt"
NAMES = [f"class {number}" for number in range(10)]
SIZE = (96, 160)
MODELS = ["yolov8n", "yolo11n", "yolo26n", "yolov10n"]
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def theirs(name, classes=10):
    """Ultralytics' model with weights from seed 0, statistics away from (0, 1), and its settings for losses."""
    ultralytics_network.package()
    from ultralytics.nn.tasks import DetectionModel
    from ultralytics.utils import DEFAULT_CFG

    torch.manual_seed(0)
    model = DetectionModel(ultralytics_network.described(name), nc=classes, verbose=False)
    model.args = DEFAULT_CFG
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()


def ours(model, name, **settings):
    """Our detector with the weights of theirs."""
    detector = YOLO.build(YOLO.Config(model=name, **settings), 10)
    detector.load_state_dict(detector.convert(model.state_dict(), NAMES))
    return detector.eval()


@pytest.fixture(scope="module")
def images():
    return torch.randint(0, 256, (2, 3, *SIZE), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


@pytest.fixture(scope="module")
def targets():
    boxes = [torch.tensor([[20.0, 30, 80, 90], [90, 6, 150, 80]]), torch.tensor([[5.0, 5, 60, 40]])]
    return Targets(boxes, [torch.tensor([3, 7]), torch.tensor([3])], [SIZE, SIZE])


@pytest.fixture(scope="module", params=MODELS)
def pair(request):
    model = theirs(request.param)
    return model, ours(model, request.param)


@torch.no_grad()
def test_maps_boxes_and_scores_are_theirs(pair, images):
    model, detector = pair
    features = detector.features(images)
    predictions = detector.predict(features)
    model.end2end = False
    model.model[-1].xyxy = True
    decoded, raw = model(images / 255)
    many = raw.get("one2many", raw)
    for mine, wanted in zip(features.levels, many["feats"], strict=True):
        torch.testing.assert_close(mine, wanted, **TOLERANCE)
    torch.testing.assert_close(predictions.boxes_BA4, decoded[:, :4].transpose(1, 2), **TOLERANCE)
    torch.testing.assert_close(predictions.logits_BAK.sigmoid(), decoded[:, 4:].transpose(1, 2), **TOLERANCE)
    assert decoded[:, :4].std() > 1


@torch.no_grad()
def test_the_detections_without_nms_are_theirs(pair, images):
    model, detector = pair
    if not detector.paired:
        assert detector.needs_nms
        with pytest.raises(UserError, match="has no one-to-one head"):
            YOLO.build(YOLO.Config(model=detector.config.model, branch="one_to_one"), 10)
        return
    assert not detector.needs_nms
    model.end2end = True
    wanted = model(images / 255)[0]
    found = detector(images, 50)
    torch.testing.assert_close(found.boxes_BN4, wanted[:, :50, :4], **TOLERANCE)
    torch.testing.assert_close(found.scores_BN, wanted[:, :50, 4], **TOLERANCE)
    assert torch.equal(found.labels_BN, wanted[:, :50, 5].long())


@torch.no_grad()
def test_images_to_candidates_by_one_branch_are_those_of_all_steps(pair, images):
    _, detector = pair
    found, steps = detector(images, 20), detector.candidates(detector.predict(detector.features(images)), 20)
    assert torch.equal(found.boxes_BN4, steps.boxes_BN4)
    assert torch.equal(found.scores_BN, steps.scores_BN)


@pytest.mark.parametrize("empty", [False, True], ids=["objects", "nothing"])
def test_losses_are_theirs(pair, images, targets, empty):
    model, detector = pair
    if empty:
        targets = Targets([torch.zeros(0, 4)] * 2, [torch.zeros(0, dtype=torch.int64)] * 2, [SIZE, SIZE])
    boxes = torch.cat(list(targets.boxes))
    height, width = SIZE
    centred = torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], 1)
    batch = {
        "img": images / 255,
        "batch_idx": torch.cat([torch.full((len(one),), float(i)) for i, one in enumerate(targets.labels)]),
        "cls": torch.cat(list(targets.labels)).float(),
        "bboxes": centred / torch.tensor([width, height, width, height]),
    }
    try:
        detector.train()
        model.train()
        wanted, _ = model.loss(batch)
        found = detector.loss(detector.predict(detector.features(images), targets), targets)
    finally:
        detector.eval()
        model.eval()
    parts = torch.stack(list(found.values())).view(-1, 3).sum(0)
    torch.testing.assert_close(parts * len(images), wanted, **TOLERANCE)
    assert (wanted.sum() > 1) or empty


def test_the_share_of_the_one_to_many_head_falls_as_theirs(targets, images):
    from ultralytics.utils.loss import E2ELoss

    model = theirs("yolo26n")
    detector = ours(model, "yolo26n")
    criterion = E2ELoss(model)
    predictions = detector.predict(detector.features(images))
    first = detector.loss(predictions, targets)
    for epoch in (0, 33, 99):
        detector.done = epoch / 99
        now = detector.loss(predictions, targets)
        share = criterion.decay(epoch)
        torch.testing.assert_close(now["cls"] / first["cls"], torch.tensor(share / 0.8))
        torch.testing.assert_close(now["one_to_one_cls"] / first["one_to_one_cls"], torch.tensor((1 - share) / 0.2))


def test_a_canvas_that_the_strides_do_not_divide_is_refused(pair):
    with pytest.raises(UserError, match=r"multiples of 32, given 100 x 128"):
        pair[1].features(torch.zeros(1, 3, 100, 128, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("name", "words"),
    [("yolo11", "has no scale"), ("yolo11n-seg", "no detection network"), ("yolo99n", "no network 'yolo99n'")],
)
def test_a_name_that_is_no_detection_network_is_refused(name, words):
    with pytest.raises(UserError, match=words):
        YOLO.build(YOLO.Config(model=name), 10)


def save_pickled(model, file):
    """As Ultralytics saves its trainings: the module itself, in half precision."""
    torch.save({"model": model.half(), "ema": None, "train_args": {}}, file)
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_pickled_model_is_opened_with_trust_in_its_very_hash_only(tmp_path):
    model = theirs("yolov8n")
    model.names = dict(enumerate(NAMES))
    file = tmp_path / "best.pt"
    digest = save_pickled(model, file)
    detector = YOLO.build(YOLO.Config(model="yolov8n"), 10)
    for trusted in ({}, {"trust": True}, {"sha256": digest}):
        with pytest.raises(UserError, match=rf"may run any code .*set trust: true and sha256: {digest}"):
            load_published(detector, file, NAMES, **trusted)
    with pytest.raises(UserError, match=rf"its sha256 is {digest}, 0+ was given"):
        load_published(detector, file, NAMES, trust=True, sha256="0" * 64)
    load_published(detector, file, NAMES, trust=True, sha256=digest)
    wanted = {key.removeprefix("model."): value for key, value in model.state_dict().items()}
    torch.testing.assert_close(detector.body[0].conv.weight, wanted["0.conv.weight"].float(), rtol=0, atol=0)


def test_a_trusted_pickle_still_calls_nothing_that_is_not_of_a_network(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'exploded'}",)

    file = tmp_path / "bomb.pt"
    torch.save({"model": Bomb()}, file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    detector = YOLO.build(YOLO.Config(model="yolov8n"), 10)
    with pytest.raises(UserError, match=r"no checkpoint of the installed ultralytics, it wants \['posix.system'\]"):
        load_published(detector, file, NAMES, trust=True, sha256=digest)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.skipif(not YOLOV5.exists(), reason="the data beside the checkout is missing")
def test_a_pickled_yolov5_is_refused_with_and_without_trust():
    digest = hashlib.sha256(YOLOV5.read_bytes()).hexdigest()
    detector = YOLO.build(YOLO.Config(model="yolov8n"), 80)
    with pytest.raises(UserError, match=rf"models\..*may run any code.*sha256: {digest}"):
        load_published(detector, YOLOV5, NAMES)
    with pytest.raises(UserError, match=r"no checkpoint of the installed ultralytics, it wants \['models"):
        load_published(detector, YOLOV5, NAMES, trust=True, sha256=digest)


def test_classes_of_a_checkpoint_are_matched_by_name(tmp_path):
    model = theirs("yolo26n", classes=80)
    state = model.state_dict()
    detector = YOLO.build(YOLO.Config(model="yolo26n", made_for=80), 2)
    detector.load_state_dict(detector.convert(state, ["dog", "person"]))  # 16 and 0 of COCO's 80
    for key in ("cv3.1.2.weight", "one2one_cv3.0.2.bias"):
        mine, wanted = detector.head.get_parameter(key), state[f"model.23.{key}"]
        assert torch.equal(mine, wanted[[16, 0]])
    with pytest.raises(ValueError, match=r"not \['plate'\]"):
        detector.convert(state, ["dog", "plate"])
    narrow = YOLO.build(YOLO.Config(model="yolo26n"), 2)
    with pytest.raises(ValueError, match="80 wide, ours 64; set made_for: 80"):
        narrow.convert(state, ["dog", "person"])
    with pytest.raises(ValueError, match="10 classes that nobody names, the dataset 2"):
        narrow.convert(theirs("yolo26n").state_dict(), ["dog", "person"])
