"""A teacher's AP on a sample is that of the same images in the whole, is kept, and can stop the stage."""

import json

import pytest
import torch

from pipeline.errors import UserError
from stages.artifacts.checkpoint import Checkpoint
from stages.detection.load import checksum
from stages.detection.records import Candidates
from stages.evaluation import teachers
from stages.evaluation.teachers import examined, sampled_ap


@pytest.fixture
def oracle(digits, build, teacher_settings, monkeypatch):
    """A teacher that finds every object, in a canvas that is as large as the images."""
    document = json.loads(digits.annotations("val").read_bytes())
    labels = {number: label for label, number in enumerate(digits.category_ids)}
    teacher = build(teacher_settings)
    names = {image["file_name"]: image["id"] for image in document["images"]}
    from deploy import predictor

    seen = []
    batch = predictor.Predictor.batch

    def noted(self, files, *rest):
        files = list(files)
        seen[:] = [names[file.name] for file in files]
        return batch(self, files, *rest)

    def forward(images, count):
        boxes, scores, found = torch.zeros(len(images), count, 4), torch.zeros(len(images), count), []
        for row in range(len(images)):
            own = [one for one in document["annotations"] if one["image_id"] == seen[row]]
            xywh = torch.tensor([one["bbox"] for one in own]).view(-1, 4)
            boxes[row, : len(own)] = torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1)
            scores[row, : len(own)] = 0.9
            found.append(torch.tensor([labels[one["category_id"]] for one in own] + [0] * (count - len(own))))
        del seen[: len(images)]
        return Candidates(boxes, scores, torch.stack(found), torch.zeros(len(images), count).long())

    monkeypatch.setattr(predictor.Predictor, "batch", noted)
    monkeypatch.setattr(teacher, "forward", forward)
    return teacher


def checkpoint(name="teacher"):
    made = Checkpoint(detector={}, classes=("a",), weights="w", parameters=1)
    return made.placed("/nowhere", name=name, key=f"{name}-key")


@pytest.mark.parametrize("images", [5, 12, 1000])
def test_who_finds_all_has_an_ap_of_one_on_any_sample(oracle, digits, images):
    assert sampled_ap(oracle, digits, images) == pytest.approx(1.0)


def test_the_sample_is_no_larger_than_asked_for(oracle, digits, tmp_path, monkeypatch):
    (found,) = examined([checkpoint()], {"teacher": oracle}, digits, 5, 0.9, tmp_path / "notes.json")
    assert (found.name, found.key, found.checksum) == ("teacher", "teacher-key", checksum(oracle))
    assert (found.ap, found.images) == (pytest.approx(1.0), 5)
    # A training that goes on does not measure again.
    monkeypatch.setattr(teachers, "sampled_ap", lambda *_: 1 / 0)
    assert examined([checkpoint()], {"teacher": oracle}, digits, 5, 0.9, tmp_path / "notes.json") == (found,)


def test_a_teacher_that_knows_nothing_is_recorded_or_refused(digits, build, teacher_settings, tmp_path):
    known = {"bad": build(teacher_settings)}
    (found,) = examined([checkpoint("bad")], known, digits, 4, 0.0, tmp_path / "notes.json")
    assert found.ap is not None
    assert found.ap < 0.05
    with pytest.raises(
        UserError, match=r"the teacher bad has \d\.\d AP on a sample of 4 .*min_teacher_ap asks for 30\.0"
    ):
        examined([checkpoint("bad")], known, digits, 4, 0.3, tmp_path / "notes.json")


def test_no_sample_no_ap(digits, build, teacher_settings, tmp_path):
    (found,) = examined([checkpoint()], {"teacher": build(teacher_settings)}, digits, 0, 0.0, tmp_path / "notes.json")
    assert (found.ap, found.images) == (None, 0)
    assert not (tmp_path / "notes.json").exists()
