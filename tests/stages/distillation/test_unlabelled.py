"""Images without labels: which step sees which, who learns from them, and which are refused."""

import json
import shutil

import pytest
import torch

from pipeline import lookup
from pipeline.errors import UserError
from stages import distill, train
from stages.data.augment import AugmentConfig
from stages.detection.records import Targets
from stages.distillation.method import DistillationMethod
from stages.distillation.task import DistillationTask
from stages.distillation.unlabelled import Unlabelled, UnlabelledConfig, load
from stages.training.clock import Clock

METHODS = "stages.distillation.methods"
LEARN = [
    name
    for name in lookup.names(METHODS)
    if lookup.subclass(lookup.module(METHODS, name), DistillationMethod).learns_unlabelled
]
RECIPE = {"steps": 4, "batch_size": 2, "optimizer": {"name": "adamw", "lr": 1e-3}}


@pytest.fixture(scope="module")
def folder(digits, tmp_path_factory):
    """Five training images, one of them in a folder of its own."""
    found = tmp_path_factory.mktemp("unlabelled")
    (found / "deeper").mkdir()
    for number, file in enumerate(sorted(digits.folder("train").glob("*.jpg"))[:5]):
        shutil.copy(file, found / ("deeper" if number == 4 else ".") / file.name)
    (found / "notes.txt").write_text("no image")
    return found


@pytest.fixture(scope="module")
def teacher(digits, tmp_path_factory, make, teacher_settings):
    config = {"detector": teacher_settings, **RECIPE}
    return make(tmp_path_factory.mktemp("teacher"), "teacher", train, config, data=digits)


def stream(folder, digits, directory, batch_size=3, seed=0):
    config = UnlabelledConfig(images=str(folder), batch_size=batch_size)
    return Unlabelled(load(config, digits, directory), digits.image_spec(), AugmentConfig(flip=0.5), config, seed)


def test_a_step_sees_the_same_whoever_comes_to_it(folder, digits, tmp_path):
    one, other = stream(folder, digits, tmp_path), stream(folder, digits, tmp_path)
    seen = [one.images(step) for step in range(4)]
    assert seen[0].shape == (3, 3, 128, 128)
    assert seen[0].dtype == torch.uint8
    assert torch.equal(other.images(3), seen[3])
    assert torch.equal(other.images(1), seen[1])
    assert not torch.equal(stream(folder, digits, tmp_path, seed=1).images(0), seen[0])
    assert len(json.loads((tmp_path / "unlabelled.json").read_text())["images"]) == 5


def test_images_of_linked_folders_count(folder, digits, tmp_path):
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "all").symlink_to(folder)
    assert stream(tmp_path / "links", digits, tmp_path).count == 5


def test_a_validation_image_is_refused_whatever_its_name(folder, digits, tmp_path):
    copied = shutil.copytree(folder, tmp_path / "mixed")
    image = next(digits.folder("val").glob("*.jpg"))
    shutil.copy(image, copied / "other.jpg")
    (copied / "broken.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match=rf"2 of 7 images .* other\.jpg is the validation image {image.name}"):
        stream(copied, digits, tmp_path)


def test_a_folder_without_images_is_refused(digits, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no image lies in"):
        stream(tmp_path / "empty", digits, tmp_path)


def test_the_student_learns_from_them(folder, digits, teacher, tmp_path, make, student_settings):
    """The same twice, and another student than without them."""
    config = {"student": student_settings, "methods": {"pkd": {"name": "pkd"}, "head": {"name": "head"}}, **RECIPE}
    config |= {"log_every": 1, "teacher_sample": 0}
    made = {
        name: make(tmp_path, name, distill, config | extra, data=digits, teacher=[teacher])
        for name, extra in (
            ("without", {}),
            ("with", {"unlabelled": {"images": str(folder), "batch_size": 2}}),
            ("again", {"unlabelled": {"images": str(folder), "batch_size": 2}}),
        )
    }
    rows = [json.loads(line) for line in made["with"].path("metrics.jsonl").read_text().splitlines()]
    seen = {name for row in rows for name in row}
    assert {name for name in seen if "unlabelled" in name} == {"pkd/unlabelled_feature"}
    assert all(row["pkd/unlabelled_feature"] > 0 for row in rows if "lr" in row)
    weights = {name: one.path(one.weights).read_bytes() for name, one in made.items()}
    assert weights["with"] == weights["again"]
    assert weights["with"] != weights["without"]
    assert (made["with"].unlabelled, made["without"].unlabelled) == (5, 0)


@pytest.mark.parametrize("name", LEARN)
def test_the_gradient_reaches_the_student(name, folder, digits, tmp_path, build, student_settings, teacher_settings):
    student, guide = build(student_settings), build(teacher_settings)
    kind = lookup.subclass(lookup.module(METHODS, name), DistillationMethod)
    method = kind(kind.Config(), student, guide)
    task = DistillationTask(student, guide, {"it": method}, stream(folder, digits, tmp_path)).train()
    images = torch.zeros((2, 3, 128, 128), dtype=torch.uint8)
    nothing = Targets([torch.zeros(0, 4)] * 2, [torch.zeros(0, dtype=torch.int64)] * 2, [(128, 128)] * 2)
    before = {key: value.clone() for key, value in method.state_dict().items()}
    losses = task(images, nothing, Clock(0, 4, 1))
    found = {key: loss for key, loss in losses.items() if key.startswith("it/unlabelled_")}
    assert {key.replace("unlabelled_", "") for key in found} == {key for key in losses if key.startswith("it/")} - {
        *found
    }
    sum(found.values()).backward()
    assert student.backbone.body.stem[0].weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in guide.parameters())
    assert all(torch.equal(value, before[key]) for key, value in method.state_dict().items())
    assert not any("unlabelled" in key for key in task.eval()(images, nothing, Clock(0, 4, 1)))


def test_methods_that_need_labels_alone_are_refused_at_once(folder, student_settings):
    methods = {"head": {"name": "head"}, "fgd": {"name": "fgd"}}
    config = distill.Config(student=student_settings, methods=methods, unlabelled={"images": str(folder)}, **RECIPE)
    (problem,) = distill.session.idle(config)
    assert problem == (
        "unlabelled: head, fgd cannot learn without labels; add a method that compares features, as pkd, or remove it"
    )
