"""The gain over the control: who is paired with whom, when a gain is shown, and what is said about fairness."""

from __future__ import annotations

from typing import Any

import pytest

from deploy.gain import paired_bootstrap
from stages.evaluation.report.comparison import Comparison, compare, fairness, times
from stages.evaluation.report.evidence import Evidence, Roles

ROLES = Roles("teacher", "student", "control", "control_equal_time")
SAMPLES = 100


def compared(story: Any, control: str = "control") -> Comparison:
    """The student against a control stage, by few samples."""
    return compare(Evidence(**story.inputs(), roles=ROLES), control, SAMPLES)


def test_one_pair_is_the_paired_bootstrap_of_its_results(story: Any) -> None:
    found = compared(story)
    evidence = Evidence(**story.inputs(), roles=ROLES)
    control, student = (evidence.results(evidence.of_stage(stage)[0]) for stage in ("control", "student"))
    expected = paired_bootstrap(control, student, story.data.annotations("val"), SAMPLES)
    assert (found.mean, found.bounds, found.spread) == (expected.difference, (expected.low, expected.high), None)
    assert expected.difference > 0.1
    low, high = 100 * expected.low, 100 * expected.high
    assert found.sentence == f"gain {100 * expected.difference:.1f} AP, 95 % interval [{low:.1f}, {high:.1f}], 1 seed"


def test_seeds_are_paired_with_their_own(three_seeds: Any) -> None:
    found = compared(three_seeds)
    assert [(pair.student.name, pair.control.name) for pair in found.pairs] == [
        (f"student[seed={seed}]", f"control[seed={seed}]") for seed in range(3)
    ]
    gains = [pair.gain for pair in found.pairs]
    assert found.mean == pytest.approx(sum(gain.difference for gain in gains) / 3)
    assert found.bounds == (min(gain.low for gain in gains), max(gain.high for gain in gains))
    assert found.spread is not None
    assert found.sentence.endswith("over seeds)")
    assert "3 seeds" in found.sentence


def test_one_student_finds_the_control_of_its_seed(three_seeds: Any, story_parts: Any) -> None:
    three_seeds.rows = [
        row for row in three_seeds.rows if not row.name.startswith("student[") or row.name == "student[seed=2]"
    ]
    renamed = [
        story_parts.renamed(row, "student") if row.name == "student[seed=2]" else row for row in three_seeds.rows
    ]
    three_seeds.rows = renamed
    (pair,) = compared(three_seeds).pairs
    assert pair.control.name == "control[seed=2]"


def dropped(story: Any, *names: str) -> Any:
    """The story without those rows."""
    story.rows = [row for row in story.rows if row.name not in names]
    return story


def test_a_student_without_control_is_no_gain(three_seeds: Any) -> None:
    assert compared(three_seeds).shown
    story = dropped(three_seeds, "control[seed=2]")
    story.checkpoints = [one for one in story.checkpoints if one.name != "control[seed=2]"]
    found = compared(story)
    assert len(found.pairs) == 2
    assert found.bounds is not None
    assert found.bounds[0] > 0
    assert found.unpaired == {"student[seed=2]": "no control has its matrix values or seed"}
    assert not found.shown
    assert found.sentence.startswith("a gain of every seed is not shown: difference +")
    assert found.sentence.endswith("; not compared: student[seed=2] (no control has its matrix values or seed)")
    assert found.to_dict()["unpaired"] == dict(found.unpaired)


def test_a_control_without_student_is_no_gain(three_seeds: Any) -> None:
    story = dropped(three_seeds, "student[seed=1]")
    story.checkpoints = [one for one in story.checkpoints if one.name != "student[seed=1]"]
    found = compared(story)
    assert dict(found.unpaired) == {"control[seed=1]": "no student has its matrix values or seed"}
    assert not found.shown


@pytest.mark.parametrize("name", ["student[seed=1]", "control[seed=1]"])
def test_a_node_that_was_not_measured_is_no_gain(three_seeds: Any, name: str) -> None:
    found = compared(dropped(three_seeds, name))
    assert found.unpaired[name] == "no AP"
    assert not found.shown


def test_two_controls_of_one_seed_are_no_partner(story: Any, story_parts: Any) -> None:
    first = next(row for row in story.rows if row.name == "control")
    story.rows = [row for row in story.rows if row.name != "control"]
    story.rows += [story_parts.renamed(first, f"control[lr={rate}]") for rate in (1, 2)]
    story.checkpoints = [
        story_parts.changed(one, {}).placed(one.directory, name="control[lr=1]", key=one.key)
        if one.name == "control"
        else one
        for one in story.checkpoints
    ]
    found = compared(story)
    assert dict(found.unpaired) == {"student": "control[lr=1] and control[lr=2] match, which is ambiguous"}
    assert (found.shown, found.mean) == (False, None)
    assert found.sentence.endswith("not measured: student: control[lr=1] and control[lr=2] match, which is ambiguous")


def test_no_gain_is_said(empty: Any) -> None:
    results = empty.row("teacher", "trained", 1.0)
    for rest, name in enumerate(("control", "student")):  # each knows half of the images
        empty.measure(name, "trained", [one for one in results if one["image_id"] % 2 == rest])
    found = compared(empty)
    assert found.bounds is not None
    assert found.bounds[0] < 0 < found.bounds[1]
    assert not found.shown
    assert found.sentence.startswith("no gain shown: difference ")


def test_no_difference_is_no_gain(empty: Any) -> None:
    results = empty.row("control", "trained", 0.7)
    empty.measure("student", "pruned", results)
    found = compared(empty)
    assert found.bounds == (0, 0)
    assert not found.shown
    assert found.sentence == "no gain shown: difference 0.0 AP, 95 % interval [0.0, 0.0], 1 seed"


def test_worse_is_said(empty: Any) -> None:
    empty.row("control", "trained", 0.95, seed=1)
    empty.row("student", "pruned", 0.3, seed=2)
    assert compared(empty).sentence.startswith("worse than its control: difference -")


def test_an_absent_control_is_said(empty: Any) -> None:
    empty.row("student", "pruned", 0.5)
    found = compared(empty)
    assert (found.pairs, found.shown, found.mean) == ((), False, None)
    assert found.sentence == "gain over control not measured: no AP of control is among the rows"


def test_like_with_like(story: Any) -> None:
    for name in ("control", "distilled"):
        story.provenance(name, settings={"optimizer": {"lr": 0.007}, "batch_size": 16, "validate_every": len(name)})
    (said,) = fairness(compared(story), same_length=True)
    assert said.startswith("student and control have the same detector, labelled images, seed, iterations and settings")


def test_unrecorded_settings_are_not_called_the_same(story: Any) -> None:
    (said,) = fairness(compared(story), same_length=True)
    assert "their other settings are not recorded" in said


@pytest.mark.parametrize(
    ("control", "settings", "difference"),
    [
        ({"images": 50}, {}, "labelled images (100 against 50)"),
        ({"seed": 7}, {}, "seed (0 against 7)"),
        ({"iterations": 475}, {}, "iterations (950 against 475)"),
        ({"detector": {"name": "retinanet", "backbone": "resnet18"}}, {}, "detector.backbone (tiny against resnet18)"),
        ({}, {"optimizer": {"lr": 0.001}}, "optimizer.lr (0.007 against 0.001)"),
    ],
)
def test_every_unfairness_is_named(
    story: Any, story_parts: Any, control: dict[str, Any], settings: dict[str, Any], difference: str
) -> None:
    story.checkpoints = [
        story_parts.changed(one, control) if one.name == "control" else one for one in story.checkpoints
    ]
    story.provenance("distilled", settings={"optimizer": {"lr": 0.007}})
    story.provenance("control", settings={"optimizer": {"lr": 0.007}} | settings)
    (said,) = fairness(compared(story), same_length=True)
    assert said == f"the comparison is not like with like, student and control differ in: {difference}"


def test_times_of_the_equal_time_control(story: Any) -> None:
    said = times(compared(story, "control_equal_time"))
    assert said == [
        "training took 180 s and 950 iterations for the student, 190 s and 2,000 iterations for control_equal_time"
    ]


def test_less_time_for_the_equal_time_control_is_said(story: Any, story_parts: Any) -> None:
    story.checkpoints = [
        story_parts.changed(one, {"seconds": 120.0}) if one.name == "control_equal_time" else one
        for one in story.checkpoints
    ]
    said = times(compared(story, "control_equal_time"))
    assert "in fact given less time than the student (120 s against 180 s)" in said[1]
