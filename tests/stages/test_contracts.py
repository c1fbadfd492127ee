"""What every detector and every method promises; a new file is tested from the moment it exists."""

import pkgutil
from importlib import import_module
from importlib.util import find_spec
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import BaseModel
from torch import nn
from torchvision.ops import box_iou

import stages
from pipeline import lookup
from pipeline.config import BaseConfig, Choice
from pipeline.errors import UserError
from stages import export, train
from stages.data.coco import CocoSplit
from stages.detection.backbone import Backbone
from stages.detection.detector import Detector
from stages.detection.load import checksum, load_detector, save_weights
from stages.detection.records import ProposalSettings, Targets
from stages.distillation.method import DistillationMethod
from stages.distillation.task import DistillationTask
from stages.training.clock import Clock

from .conftest import CASCADE, DISTRIBUTIONS, POINTS, SSD, STUDENT, TEACHER

SETTINGS = {
    "retinanet": STUDENT,
    "fcos": POINTS,
    "gfl": DISTRIBUTIONS,
    "ssdlite": SSD,
    "faster_rcnn": TEACHER,
    "cascade_rcnn": CASCADE,
    "yolo": {"name": "yolo", "model": "yolo26n"},
}  # a tiny form of each detector
EXTRAS = {"yolo": ("ultralytics", "pip install 'headstart[ultralytics]' (AGPL-3.0)")}  # package, and how it comes
METHODS = {  # settings that fit the tiny pair
    "crosskd": {"convs": 1},
    "cwd": {"weight": 1.0},
    "fgd": {"foreground": 0.1, "background": 0.1, "attention": 0.1, "relation": 0.01},
    "fitnet": {},
    "hands_on": {"warmup": 0},
    "head": {"rois": 8, "proposals": 16, "warmup": 0},
    "ld": {"main": 1.0, "valuable": 1.0},
    "mgd": {"weight": 0.01},
    "pkd": {"weight": 1.0},
    "task_adaptive": {"classification": 0, "regression": 0},
    "tf_head": {
        "rois": 8,
        "proposals": 16,
        "warmup": 0,
        "normalise": True,  # what is imitated grows while the assistant learns, and the raw error with it
        "assistants": {
            "rcnn": {"assistant": {"name": "rcnn", "head": {"hidden": 32, "sampling_ratio": 1}}, "ckd": 1.3},
            "fcos": {"assistant": {"name": "fcos", "head": {"convs": 1, "reach": 2}, "weight": 0.5}},
        },
    },
}
STUDENTS = {"ld": DISTRIBUTIONS}  # where it is not STUDENT
TEACHERS = {  # where it is not TEACHER
    "crosskd": {**STUDENT, "extra_levels": 0, "neck_channels": 16, "head_convs": 2},
    "ld": {**DISTRIBUTIONS, "neck": "fpn", "extra_levels": 0},
}
SIZE = (96, 128)


def marked(name):
    """A parameter that is skipped, with the command that installs it, where the extra of its detector is not there."""
    package, command = EXTRAS.get(name, ("torch", ""))
    return pytest.param(name, marks=[] if find_spec(package) else [pytest.mark.skip(reason=command)])


def detectors():
    """All of them."""
    return [marked(name) for name in lookup.names("stages.detection.detectors")]


def with_a_pyramid():
    """Detectors on one of our backbones."""
    return [one for one in detectors() if "backbone" in SETTINGS[one.values[0]]]


def dense():
    """Those that a graph can hold, our students."""
    return [one for one in detectors() if lookup_detector(one.values[0]).exportable]


def lookup_detector(name):
    return lookup.subclass(lookup.module("stages.detection.detectors", name), Detector)


def settle(checkpoint, data):
    """Give a checkpoint of few steps the batch statistics of real images: with those of a beginner nothing passes a deep
    network, and every place scores alike."""
    file = checkpoint.path(checkpoint.weights)
    detector = load_detector(checkpoint.detector, len(checkpoint.classes), file).train()
    for module in detector.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
            module.reset_running_stats()
    files = CocoSplit(data.folder("train"), data.annotations("train")).files[:8]
    images = torch.stack([torch.from_numpy(np.array(Image.open(file).convert("RGB"))) for file in files])
    with torch.no_grad():
        detector.predict(detector.features(images.permute(0, 3, 1, 2)))
    save_weights(detector, file, checkpoint.classes)


LIGHT = {"head_kind": "depthwise", "head_norm": "batch", "head_kernel": 1, "head_channels": 24, "head_convs": 2}
KINDS = {one.values[0]: SETTINGS[one.values[0]] for one in dense()}
KINDS["light retinanet"] = {**STUDENT, **LIGHT}
KINDS["light fcos"] = {**POINTS, **LIGHT}


def methods():
    return lookup.names("stages.distillation.methods")


def backbones():
    """Every variant of every family; of timm's, which are many, two of different structure."""
    package = "stages.detection.backbones"
    families = {name: lookup.subclass(lookup.module(package, name), Backbone) for name in lookup.names(package)}
    listed = [one for name, family in families.items() if name != "timm" for one in family.variants or [name]]
    return [*listed, "timm/mobilenetv4_conv_small", "timm/convnext_atto"]


@pytest.fixture
def batch():
    images = torch.randint(0, 256, (2, 3, *SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images[0, :, 20:60, 30:80] = 250
    boxes = [torch.tensor([[30.0, 20, 80, 60]]), torch.zeros(0, 4)]
    return images, Targets(boxes, [torch.tensor([3]), torch.zeros(0, dtype=torch.int64)], [SIZE, (90, 128)])


def test_a_new_file_has_tiny_settings_here():
    assert {one.values[0] for one in detectors()} <= set(SETTINGS), "say in SETTINGS how the new detector is made small"
    assert set(methods()) <= set(METHODS), "say in METHODS how the new method is tried on the tiny pair"


@pytest.mark.parametrize("name", [marked(name) for name in {**SETTINGS, **KINDS}])
def test_detector_overfits_one_image(name, build, batch):
    """Of two images it finds the object of the one, and is less sure of anything in the other, which has none."""
    detector = build({**SETTINGS, **KINDS}[name]).train()
    optimizer = torch.optim.AdamW(detector.parameters(), lr=3e-3)
    images, targets = batch
    for _ in range(30):
        losses = detector.loss(detector.predict(detector.features(images), targets), targets)
        assert all(loss.item() >= 0 for loss in losses.values())
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in detector.parameters())
        optimizer.step()
    with torch.no_grad():  # by the batch's own statistics: the running ones have not got there in so few steps
        found = detector(images, 20)
    assert found.labels_BN[0, 0] == targets.labels[0][0]
    assert box_iou(found.boxes_BN4[0, :1], targets.boxes[0]) > 0.5
    assert found.scores_BN[0, 0] > 2 * found.scores_BN[1, 0]


@pytest.mark.parametrize("name", detectors())
def test_every_parameter_of_a_detector_learns(name, build, batch):
    detector = build(SETTINGS[name]).train()
    images, targets = batch
    losses = detector.loss(detector.predict(detector.features(images), targets), targets)
    torch.stack(list(losses.values())).sum().backward()
    assert [key for key, p in detector.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("name", detectors())
def test_candidates_are_a_fixed_number_best_first_and_of_our_classes(name, build, batch):
    detector = build(SETTINGS[name]).eval()
    with torch.no_grad():
        found = detector(batch[0], 50)
    assert found.boxes_BN4.shape == (2, 50, 4)
    assert (found.scores_BN.diff(dim=1) <= 0).all()
    assert ((found.labels_BN >= 0) & (found.labels_BN < 10)).all()


@pytest.mark.parametrize("name", sorted(set(KINDS) - {"yolo"}))  # it finds nothing after two steps: test_yolo_chain.py
def test_exported_file_agrees_with_pytorch_on_images(name, tmp_path, digits):
    """Seven images in batches of four: a file that fixed the batch would not take the second."""
    settings = {"steps": 2, "batch_size": 4, "device": "cpu", "optimizer": {"name": "adamw", "lr": 1e-3, "warmup": 1}}
    config = train.Config(detector=KINDS[name], **settings)
    checkpoint = train.run(config, tmp_path, data=digits).placed(tmp_path, name="student", key="key")
    settle(checkpoint, digits)
    config = export.Config(score_threshold=0.001, parity_images=7, candidates=200)
    made = export.run(config, tmp_path, checkpoint=checkpoint, data=digits)
    assert made.parity.passed
    assert made.parity.matched > 0
    assert made.initialisers > 10


@pytest.mark.parametrize("name", detectors())
def test_proposals_are_detached_inside_the_image_and_know_their_source(name, build, batch):
    detector = build(SETTINGS[name]).train()
    images, targets = batch
    predictions = detector.predict(detector.features(images), targets)
    for found, (height, width) in zip(
        detector.proposals(predictions, targets.sizes, ProposalSettings(20, 0.7, 30)), targets.sizes, strict=True
    ):
        assert 0 < len(found.boxes) <= 30
        assert not found.boxes.requires_grad
        assert found.boxes.min() >= 0
        assert (found.boxes.max(0).values <= torch.tensor([width, height, width, height])).all()
        assert (found.source >= 0).all()
        assert (found.source < len(predictions.anchors.boxes_A4)).all()


@pytest.mark.parametrize("name", detectors())
def test_a_batch_without_objects_has_finite_losses_and_gradients(name, build, batch):
    detector = build(SETTINGS[name]).train()
    empty = Targets([torch.zeros(0, 4)] * 2, [torch.zeros(0, dtype=torch.int64)] * 2, [SIZE] * 2)
    losses = detector.loss(detector.predict(detector.features(batch[0]), empty), empty)
    torch.stack(list(losses.values())).sum().backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(p.grad is None or p.grad.isfinite().all() for p in detector.parameters())


@pytest.mark.parametrize("backbone", backbones())
@pytest.mark.parametrize("name", with_a_pyramid())
def test_every_backbone_fits_every_detector(name, backbone, build):
    settings = {**SETTINGS[name], "backbone": backbone, "trainable_layers": 3, "backbone_norm": "frozen"}
    with torch.device("meta"), torch.no_grad():  # shapes are all that is asked
        detector = build(settings).eval()
        features = detector.features(torch.zeros(1, 3, 128, 128, dtype=torch.uint8))
    assert [128 // level.shape[-1] for level in features.levels] == list(detector.strides)
    assert [level.shape[1] for level in features.levels] == list(detector.channels)
    body = detector.backbone.body
    assert [128 // stage.shape[-1] for stage in features.backbone] == [4, 8, 16, 32]
    assert [stage.shape[1] for stage in features.backbone] == list(body.channels)
    assert [body.get_submodule(cut) for cut in body.cuts]
    frozen = [p.requires_grad for p in body.parameters()]
    assert not all(frozen)
    assert any(frozen)
    assert frozen == sorted(frozen)  # a beginning of the network


def test_depthwise_heads_cost_a_fraction(build):
    from stages.evaluation.flops import inference_flops

    plain = {**STUDENT, "head_convs": 4, "neck_channels": 64}
    deep = inference_flops(build({**plain, "head_kind": "depthwise"}), *SIZE)
    assert deep < 0.6 * inference_flops(build(plain), *SIZE)


def test_a_deep_depthwise_tower_passes_what_enters_it(build):
    """Without a normalisation, too: with RetinaNet's first weights a thousandth of it would come out."""
    head = build({**STUDENT, "head_convs": 4, "neck_channels": 32, "head_norm": "none", "head_kind": "depthwise"}).head
    entering = torch.randn(1, 32, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        left = head.classification_head.tower(0)(entering)
    assert left.square().mean().sqrt() > 0.1


@pytest.mark.parametrize("name", detectors())
def test_geometry_is_in_full_precision_under_autocast(name, build):
    """On a large canvas, where bfloat16 has steps of 4 pixels."""
    detector = build(SETTINGS[name]).eval()
    images = torch.zeros(1, 3, 1088, 1088, dtype=torch.uint8)
    with torch.no_grad():
        plain = detector.predict(detector.features(images)).anchors.boxes_A4
        with torch.autocast("cpu", dtype=torch.bfloat16):
            predictions = detector.predict(detector.features(images))
            found = detector.proposals(predictions, [(1088, 1088)], ProposalSettings(20, 0.7, 20))
            candidates = detector.candidates(predictions, 20)
    assert torch.equal(predictions.anchors.boxes_A4, plain)
    assert {t.dtype for t in (found[0].boxes, candidates.boxes_BN4)} == {torch.float32}


@pytest.fixture
def pair(build, name):
    """A student and a teacher that the method fits, of other strides and, to make adapters, of other channels."""
    return build({**STUDENTS.get(name, STUDENT), "neck_channels": 24}), build(TEACHERS.get(name, TEACHER))


def make_method(name, student, teacher, **settings):
    choice = Choice.parse(DistillationMethod, {"name": name, **METHODS[name], **settings})
    return choice.cls(choice.config, student, teacher)


@pytest.mark.parametrize("name", methods())
def test_method_lowers_its_own_loss_and_leaves_the_teacher_alone(name, pair, batch):
    student, teacher = pair
    before = checksum(teacher)
    torch.manual_seed(0)
    task = DistillationTask(student, teacher, {name: make_method(name, student, teacher)})
    optimizer = torch.optim.AdamW([p for group, _ in task.parameter_groups() for p in group], lr=1e-3)
    totals = []
    task.train()
    for step in range(20):
        torch.manual_seed(step)
        losses = task(*batch, Clock(step + 100, 1000, 10))
        own = {key: loss for key, loss in losses.items() if key.startswith(f"{name}/")}
        assert own
        assert all(loss.isfinite() and loss.item() >= 0 for loss in own.values())
        total = torch.stack(list(own.values())).sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert sum(totals[-3:]) < 0.9 * sum(totals[:3])
    assert checksum(teacher) == before
    assert not teacher.training
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


NO_COMMON_TOWER = {  # for a student whose class towers differ from level to level: CKD is off
    "head": {"ckd": 0},
    "tf_head": {"assistants": {"rcnn": {"assistant": METHODS["tf_head"]["assistants"]["rcnn"]["assistant"], "ckd": 0}}},
}
DO_NOT_FIT = {
    *(("crosskd", name) for name in ("ssdlite", "yolo")),
    *(("ld", name) for name in ("retinanet", "fcos", "ssdlite", "yolo")),
}


@pytest.mark.parametrize("student", dense())
@pytest.mark.parametrize("name", methods())
def test_method_teaches_every_dense_student_or_refuses_it(name, student, build, batch):
    learner, teacher = build(SETTINGS[student]), build(TEACHERS.get(name, TEACHER))
    settings = NO_COMMON_TOWER.get(name, {}) if learner.tower_channels is None else {}
    if (name, student) in DO_NOT_FIT:
        with pytest.raises(UserError, match=f"method {name}: "):
            make_method(name, learner, teacher, **settings)
        return
    method = make_method(name, learner, teacher, **settings)
    task = DistillationTask(learner, teacher, {name: method}).train()
    losses = task(*batch, Clock(100, 1000, 10))
    own = [loss for key, loss in losses.items() if key.startswith(f"{name}/")]
    assert all(loss.isfinite() and loss.item() >= 0 for loss in own)
    torch.stack(own).sum().backward()
    reached = [p.grad for p in learner.parameters() if p.grad is not None]
    assert reached
    assert all(gradient.isfinite().all() for gradient in reached)
    assert any(gradient.any() for gradient in reached)


@pytest.mark.parametrize("name", methods())
def test_method_keeps_no_detector(name, pair):
    student, teacher = pair
    method = make_method(name, student, teacher)
    assert not any(isinstance(module, Detector) for module in method.modules())
    task = DistillationTask(student, teacher, {name: method})
    assert {key.split(".")[0] for key in task.state_dict()} <= {"student", "methods"}
    own = {id(tensor) for tensor in method.parameters()}
    assert not own & {id(tensor) for tensor in student.parameters()}
    assert not own & {id(tensor) for tensor in teacher.parameters()}


@pytest.mark.parametrize("name", methods())
def test_the_student_is_the_same_with_and_without_the_method(name, pair, batch):
    student, teacher = pair
    task = DistillationTask(student, teacher, {name: make_method(name, student, teacher)}).eval()
    with torch.no_grad():
        before = student(batch[0], 20)
        task(*batch, Clock(100, 1000, 10))
        after = student(batch[0], 20)
    assert torch.equal(before.scores_BN, after.scores_BN)
    assert torch.equal(before.boxes_BN4, after.boxes_BN4)


@pytest.mark.parametrize("name", methods())
def test_one_image_without_objects_has_finite_losses_and_gradients(name, pair):
    student, teacher = pair
    task = DistillationTask(student, teacher, {name: make_method(name, student, teacher)}).train()
    images = torch.full((1, 3, *SIZE), 114, dtype=torch.uint8)
    nothing = Targets([torch.zeros(0, 4)], [torch.zeros(0, dtype=torch.int64)], [SIZE])
    losses = task(images, nothing, Clock(100, 1000, 10))
    torch.stack(list(losses.values())).sum().backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(p.grad is None or p.grad.isfinite().all() for p in task.parameters())


@pytest.mark.parametrize("name", methods())
def test_method_works_in_mixed_precision(name, pair, batch):
    student, teacher = pair
    task = DistillationTask(student, teacher, {name: make_method(name, student, teacher)})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = task(*batch, Clock(100, 1000, 10))
    torch.stack(list(losses.values())).sum().backward()
    own = [loss for key, loss in losses.items() if key.startswith(f"{name}/")]
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in own)


def configs(kind):
    """A Config and all models inside it."""
    yield kind
    for field in kind.model_fields.values():
        for inner in (field.annotation, *get_args(field.annotation)):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                yield from configs(inner)


def all_configs():
    for module in pkgutil.iter_modules(stages.__path__):
        if not module.ispkg:
            yield f"stages.{module.name}", import_module(f"stages.{module.name}").Config
    for package, kind in (
        ("stages.detection.detectors", Detector),
        ("stages.distillation.methods", DistillationMethod),
    ):
        for name in lookup.names(package):
            yield name, lookup.subclass(lookup.module(package, name), kind).Config


@pytest.mark.parametrize(
    ("where", "kind"), list(all_configs()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_every_setting_is_explained(where, kind):
    assert issubclass(kind, BaseConfig)
    silent = [
        f"{c.__qualname__}.{name}" for c in configs(kind) for name, f in c.model_fields.items() if not f.description
    ]
    assert silent == [], where
