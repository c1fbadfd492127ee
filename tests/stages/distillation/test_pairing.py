"""Who is paired with whom, and what bridges them."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from pipeline.errors import UserError
from stages.detection.load import checksum
from stages.distillation.pairing import PairedMaps, adapters, backbone_shape, pair_levels, resized


def test_by_stride_only_what_both_have():
    assert pair_levels((8, 16, 32, 64), (4, 8, 16, 32)) == [(0, 1), (1, 2), (2, 3)]
    assert pair_levels((4, 8, 16, 32), (8, 16, 32, 64), "stride") == [(1, 0), (2, 1), (3, 2)]


def test_by_index_until_one_has_no_more():
    assert pair_levels((8, 16, 32, 64, 128), (4, 8, 16), "index") == [(0, 0), (1, 1), (2, 2)]


@pytest.mark.parametrize(("mine", "theirs", "how"), [((8, 16), (4, 32), "stride"), ((8, 16), (), "index")])
def test_nothing_to_pair_names_both(mine, theirs, how):
    with pytest.raises(ValueError, match="the student has strides") as caught:
        pair_levels(mine, theirs, how)
    assert str(list(mine)) in str(caught.value)
    assert str(list(theirs)) in str(caught.value)


def test_adapters_only_where_channels_differ():
    made = adapters([(0, 1), (1, 0)], (8, 16), (16, 12))
    assert made[0].weight.shape == (12, 8, 1, 1)
    assert isinstance(made[1], nn.Identity)
    assert isinstance(adapters([(0, 0)], (8,), (8,))[0], nn.Identity)
    assert adapters([(0, 0)], (8,), (8,), always=True)[0].weight.shape == (8, 8, 1, 1)


def test_resizing_compares_both_sides_and_copies_nothing_that_fits():
    x = torch.arange(24.0).view(1, 2, 3, 4)
    assert resized(x, (3, 4)) is x
    assert torch.equal(resized(x, (3, 8)), functional.interpolate(x, (3, 8), mode="bilinear"))


def test_the_shapes_of_a_backbone_are_those_it_computes(build, student_settings):
    student = build(student_settings).train()
    before = checksum(student)
    strides, channels = backbone_shape(student)
    assert student.training
    assert checksum(student) == before
    assert {p.device.type for p in student.parameters()} == {"cpu"}
    stages = student.features(torch.zeros(1, 3, 64, 64)).backbone
    assert [64 // stage.shape[-1] for stage in stages] == list(strides)
    assert [stage.shape[1] for stage in stages] == list(channels)


@pytest.mark.parametrize(("stages", "count"), [("neck", 3), ("backbone", 4), ("all", 7)])
def test_maps_of_a_pair_have_the_teachers_shape(build, student_settings, teacher_settings, stages, count):
    student = build({**student_settings, "neck_channels": 24})
    teacher = build({**teacher_settings, "backbone": "resnet18"})
    images = torch.zeros(2, 3, 64, 96)
    wanted = teacher.features(images)
    for how in ("stride", "index"):
        paired = PairedMaps("some", student, teacher, how, stages)
        found = paired(student.features(images), wanted)
        assert len(found) == count + (how == "index" and stages != "backbone")
        assert [mine.shape for mine, _ in found] == [theirs.shape for _, theirs in found]
        assert [theirs.shape[1] for _, theirs in found] == paired.channels
        assert all(mine.requires_grad and not theirs.requires_grad for mine, theirs in found)


def test_by_stride_no_map_is_resized(build, student_settings, teacher_settings):
    student, teacher = build(student_settings), build(teacher_settings)
    images = torch.rand(1, 3, 64, 64) * 255
    mine, theirs = student.features(images), teacher.features(images)
    found = PairedMaps("some", student, teacher)(mine, theirs)
    assert all(torch.equal(s, level) for (s, _), level in zip(found, mine.levels, strict=False))
    assert all(torch.equal(t, level) for (_, t), level in zip(found, theirs.levels[1:], strict=False))


def test_a_pair_that_cannot_be_bridged_is_refused_by_the_methods_name(build, student_settings, teacher_settings):
    student, teacher = build(student_settings), build(teacher_settings)
    student.strides = (64, 128)
    with pytest.raises(UserError, match=r"method some: neck: .*\[64, 128\].*\[4, 8, 16, 32\]"):
        PairedMaps("some", student, teacher)
