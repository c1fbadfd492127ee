"""Arms: who is one, which control is its own, what is refused, and what is said of all of them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploy.gain import resample
from stages import report
from stages.artifacts.checkpoint import DistilledCheckpoint, Teacher
from stages.evaluation.report.arms import Experiment, experiment, group_of, lacks, verdict
from stages.evaluation.report.estimate import estimate
from stages.evaluation.report.evidence import Evidence, Roles
from stages.evaluation.report.sections import audit
from stages.evaluation.report.sections.experiment import arms, arms_table, where_it_pays

ROLES = Roles("teacher", "student", "control", "control_equal_time")
SAMPLES = 60


def plain(story: Any, name: str, quality: float, luck: int, **values: Any) -> None:
    """A training without help."""
    story.row(name, "trained", quality, seed=luck)
    story.train(name, **values)


def helped(story: Any, name: str, quality: float, luck: int, method: str, **values: Any) -> None:
    """A training with help."""
    story.row(name, "distilled", quality, seed=luck, source="teacher")
    given = {"methods": {"m": {"name": method}}, "methods_flops": 1, "probes": "p", "seconds": 200.0}
    story.train(name, DistilledCheckpoint, "teacher", **(given | values))


def make_experiment(story: Any, seeds: tuple[int, ...] = (0, 1, 2)) -> Any:
    """Control, a longer one, an arm that helps much, one that does nothing, and one of a single seed."""
    plain(story, "teacher", 0.97, 90, detector={"name": "faster_rcnn"}, images=3000)
    for seed in seeds:
        plain(story, f"control[seed={seed}]", 0.5, seed, seed=seed)
        plain(story, f"long[seed={seed}]", 0.6, 10 + seed, seed=seed, iterations=2000, seconds=210.0)
        helped(story, f"much[seed={seed}]", 0.9, 20 + seed, "head", seed=seed)
        helped(story, f"none[seed={seed}]", 0.5, 30 + seed, "pkd", seed=seed)
    helped(story, f"once[seed={seeds[0]}]", 0.7, 40, "cwd", seed=seeds[0])
    return story


def found_in(story: Any, roles: Roles = ROLES) -> Experiment:
    found = experiment(Evidence(**story.inputs(), roles=roles), SAMPLES)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def shared(shared_empty: Any) -> Any:
    """An experiment of three arms, not to be changed."""
    return make_experiment(shared_empty)


@pytest.fixture
def arm_story(shared: Any) -> Any:
    """The same, whose lists may be changed; the files are shared."""
    return dataclasses.replace(shared, rows=[*shared.rows], checkpoints=[*shared.checkpoints])


@pytest.fixture(scope="module")
def made(shared: Any) -> tuple[Any, Path]:
    """The experiment, and the folder that the stage wrote."""
    out = shared.folder.parent / "out"
    out.mkdir()
    report.run(report.Config(images=0), out, **shared.inputs())
    return shared, out


def changed(story: Any, parts: Any, name: str, **values: Any) -> None:
    story.checkpoints = [parts.changed(one, values) if one.name == name else one for one in story.checkpoints]


def test_an_arm_is_a_stage_with_its_matrix_but_for_the_seed() -> None:
    assert group_of("control") == "control"
    assert group_of("control[seed=0]") == "control"
    assert group_of("control[images=100,seed=0]") == "control[images=100]"
    assert group_of("control[images=100,steps=5,seed=0,lr=1]", ("seed", "images", "steps")) == "control[lr=1]"


def test_arms_and_controls_are_found_by_what_they_are(arm_story: Any) -> None:
    found = found_in(arm_story)
    assert [(arm.name, arm.methods, list(arm.group.runs)) for arm in found.arms] == [
        ("much", "head", [0, 1, 2]),
        ("none", "pkd", [0, 1, 2]),
        ("once", "cwd", [0]),
    ]
    assert [(arm.control and arm.control.name, arm.longer and arm.longer.name) for arm in found.arms] == [
        ("control", "long")
    ] * 3
    assert not any(arm.refused or arm.favoured for arm in found.arms)


def test_a_gain_is_that_of_its_seeds_on_the_same_draws(arm_story: Any) -> None:
    found = found_in(arm_story)
    evidence = Evidence(**arm_story.inputs(), roles=ROLES)
    annotations = arm_story.data.annotations("val")
    names = [f"{stage}[seed={seed}]" for stage in ("much", "control") for seed in range(3)]
    rows = {row.name: evidence.results(row) for row in evidence.rows}
    drawn = resample([rows[name] for name in names], annotations, SAMPLES)
    expected = estimate(drawn.ap_M[:3] - drawn.ap_M[3:], drawn.drawn_MS[:3] - drawn.drawn_MS[3:])
    assert found.arms[0].gain == expected
    assert expected.shown
    aps = {row.name: row.statistics["ap"] for row in evidence.rows}
    assert expected.gains == pytest.approx([aps[f"much[seed={s}]"] - aps[f"control[seed={s}]"] for s in range(3)])


def test_arms_are_compared_with_one_another_on_common_seeds(arm_story: Any) -> None:
    found = found_in(arm_story)
    there, back = found.between["much", "none"], found.between["none", "much"]
    assert (there.mean, there.low) == pytest.approx((-back.mean, -back.high))
    assert len(there.gains) == 3
    assert len(found.between["much", "once"].gains) == 1
    assert found.between["much", "none"].shown


def test_the_verdict_counts_the_gains_that_are_shown(arm_story: Any, story_parts: Any) -> None:
    found = found_in(arm_story)
    shown = sum(arm.gain is not None and arm.gain.shown for arm in found.arms)
    best = found.arms[0].gain
    assert best is not None
    assert shown > 0
    said = f"a gain over the control is shown by {shown} of 3 arms; the largest is that of much: {best.sentence}"
    assert verdict(found) == said
    alike = [dataclasses.replace(arm, gain=dataclasses.replace(best, mean=0.0, low=-0.1)) for arm in found.arms]
    assert "is shown by none of 3 arms" in verdict(dataclasses.replace(found, arms=alike))


HEAD = {"name": "head", "akd": 0.3, "ckd": 0.3, "assistant": {"name": "rcnn"}}


@pytest.mark.parametrize(
    ("part", "whole", "is_part"),
    [
        ({"head": HEAD}, {"head": HEAD, "pkd": {"name": "pkd"}}, True),
        ({"head": {**HEAD, "akd": 0, "ckd": 0.0}}, {"head": HEAD}, True),
        ({"head": {**HEAD, "ckd": 0}}, {"head": HEAD, "pkd": {"name": "pkd"}}, True),
        ({"head": HEAD}, {"head": {**HEAD, "ckd": 0}}, False),
        ({"head": HEAD}, {"head": HEAD}, False),
        ({"head": {**HEAD, "akd": 0.1}}, {"head": HEAD}, False),
        ({"pkd": {"name": "pkd"}}, {"head": HEAD}, False),
    ],
)
def test_an_ablation_lacks_a_part_and_has_nothing_else(part: Any, whole: Any, is_part: bool) -> None:
    assert lacks(part, whole) is is_part


def test_what_a_part_adds_is_said(arm_story: Any, story_parts: Any) -> None:
    for one in list(arm_story.checkpoints):
        methods = {"much": {"head": HEAD}, "none": {"head": {**HEAD, "akd": 0, "ckd": 0}}}.get(
            one.name.partition("[")[0]
        )
        if methods:
            changed(arm_story, story_parts, one.name, methods=methods)
    found = found_in(arm_story)
    ((whole, part, gain),) = found.ablations
    assert (whole.name, part.name, gain) == ("much", "none", found.between["much", "none"])
    assert f"arm much over none, which is the same with less help: {gain.sentence}" in arms(found).sentences


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"images": 50}, "control, the nearest, differs in labelled images (50 against 100)"),
        ({"iterations": 900}, "control, the nearest, differs in iterations (900 against 950)"),
        ({"detector": {"name": "fcos"}}, "no plain training of its student (fcos) is wired in"),
    ],
)
def test_arms_of_another_budget_are_refused(arm_story: Any, story_parts: Any, values: Any, said: str) -> None:
    changed(arm_story, story_parts, "once[seed=0]", **values)
    arm = found_in(arm_story).arms[2]
    assert said in arm.refused
    assert (arm.gain, arm.gain_over_longer) == (None, None)
    section = arms(found_in(arm_story))
    assert section.sentences[-1] == f"arm once is not compared: {arm.refused}"


def test_settings_of_training_are_part_of_the_budget(empty: Any) -> None:
    arm_story = make_experiment(empty, (0,))
    for name in ("control[seed=0]", "long[seed=0]"):
        arm_story.provenance(name, settings={"optimizer": {"lr": 0.01}, "batch_size": 16})
    arm_story.provenance("once[seed=0]", settings={"optimizer": {"lr": 0.02}, "batch_size": 8})
    refused = found_in(arm_story).arms[2].refused
    assert refused.endswith("differs in batch_size (8 against 16); optimizer.lr (0.02 against 0.01)")


def test_a_seed_without_a_control_is_refused(arm_story: Any, story_parts: Any) -> None:
    arm_story.checkpoints = [one for one in arm_story.checkpoints if one.name != "control[seed=2]"]
    refused = {arm.name: arm.refused for arm in found_in(arm_story).arms}
    assert refused == dict.fromkeys(("much", "none"), "control was not trained with seed 2") | {"once": ""}


def test_an_arm_that_was_not_measured_is_refused(arm_story: Any) -> None:
    arm_story.rows = [row for row in arm_story.rows if row.name != "none[seed=1]"]
    assert found_in(arm_story).arms[1].refused == "no AP of none[seed=1] is among the rows"


def test_of_two_controls_the_named_one_counts(arm_story: Any) -> None:
    for seed in range(3):
        plain(arm_story, f"again[seed={seed}]", 0.5, 50 + seed, seed=seed)
    assert [arm.control and arm.control.name for arm in found_in(arm_story).arms] == ["control"] * 3
    other = found_in(arm_story, Roles("teacher", "student", "nobody", ""))
    assert {arm.refused for arm in other.arms} == {
        "control and again could each be its control; name one with `control`"
    }
    assert verdict(other) == "none of 3 arms could be compared with a control"


def test_the_teacher_is_no_control(arm_story: Any, story_parts: Any) -> None:
    """Not even where it is the student's own detector, trained alike: it taught the arm."""
    teacher = next(one for one in arm_story.checkpoints if one.name == "teacher")
    same = {"detector": {"name": "retinanet", "backbone": "tiny"}, "images": 100}
    changed(arm_story, story_parts, "teacher", **same)
    taught = {"teachers": (Teacher(name="teacher", key=teacher.key, checksum="c"),)}
    for one in list(arm_story.checkpoints):
        if isinstance(one, DistilledCheckpoint):
            changed(arm_story, story_parts, one.name, **taught)
    roles = Roles("teacher", "student", "nobody", "")
    assert [arm.control and arm.control.name for arm in found_in(arm_story, roles).arms] == ["control"] * 3


def test_a_longer_control_that_had_less_time_is_said(arm_story: Any, story_parts: Any) -> None:
    for seed in range(3):
        changed(arm_story, story_parts, f"long[seed={seed}]", seconds=150.0)
    found = found_in(arm_story)
    assert all(arm.favoured for arm in found.arms)
    assert arms_table(found).rows[-1][-1].endswith(" (had less time)")
    assert "over long, which had less time (150 s against 200 s): " in arms(found).sentences[0]


def test_the_control_of_equal_time_is_the_shortest_that_took_as_long(arm_story: Any) -> None:
    for seed in range(3):
        plain(arm_story, f"longer[seed={seed}]", 0.6, 60 + seed, seed=seed, iterations=9000, seconds=900.0)
    assert {arm.longer and arm.longer.name for arm in found_in(arm_story).arms} == {"long"}


def test_without_a_longer_control_equal_time_is_not_claimed(arm_story: Any) -> None:
    arm_story.checkpoints = [one for one in arm_story.checkpoints if not one.name.startswith("long")]
    section = arms(found_in(arm_story))
    assert any("nothing is said of equal time" in note for note in section.notes)
    assert not any("over long" in sentence for sentence in section.sentences)


def test_a_pruned_student_stands_for_its_training(arm_story: Any) -> None:
    results = json.loads((arm_story.folder / "once[seed=0].json").read_text())
    arm_story.rows = [row for row in arm_story.rows if row.name != "once[seed=0]"]
    arm_story.measure("student", "pruned", results, "once[seed=0]")
    arm = found_in(arm_story).arms[2]
    assert [run.row.name for run in arm.group.runs.values()] == ["student"]
    assert arm.gain is not None


def test_one_arm_is_no_experiment(story: Any) -> None:
    assert experiment(Evidence(**story.inputs(), roles=ROLES), SAMPLES) is None


def test_table_has_controls_and_arms(arm_story: Any) -> None:
    table = arms_table(found_in(arm_story))
    assert [line[0] for line in table.rows] == ["control", "long", "much", "none", "once"]
    assert [line[2] for line in table.rows] == ["3", "3", "3", "3", "1"]
    assert all(len(line) == len(table.head) for line in table.rows)
    assert table.rows[0][-3:] == ("-", "-", "-")


def test_stage_writes_an_experiment(made: tuple[Any, Path]) -> None:
    _, out = made
    record = json.loads((out / "report.json").read_text())
    assert [arm["name"] for arm in record["arms"]] == ["much", "none", "once"]
    much = record["arms"][0]
    assert much["gain"]["mean"] == pytest.approx(np.mean(much["ap"]) - np.mean(much["control"]["ap"]), abs=2e-4)
    assert much["gain"]["shown"]
    assert {(one["arm"], one["other"]) for one in record["arms_between"]} >= {("much", "none"), ("once", "much")}
    text = (out / "report.md").read_text()
    assert text.index("## Arms against the control") < text.index("## Models")
    assert "3 seeds" in text
    assert "not measured" not in text  # no student is to be shipped, so none is missed
    page = (out / "report.html").read_text()
    assert "at equal iterations" in page
    assert page.count("<svg") == 4  # arms, AP, while training, losses
    assert (out / "summary.txt").read_text().split()[:2] == ["arm", "methods"]


def test_losses_of_many_trainings_are_drawn_once_an_arm(made: tuple[Any, Path]) -> None:
    story, _ = made
    losses = audit.training(Evidence(**story.inputs(), roles=ROLES)).plots[1]
    assert losses.caption.startswith("weighted losses of the first seed")
    assert losses.svg.count(">step<") == 6  # teacher, control, long, much, none, once


def grid(story: Any, cells: list[tuple[int, int]]) -> Experiment:
    """Control and one arm on labelled images and iterations."""
    for place, (images, steps) in enumerate(cells):
        axes, values = f"[images={images},steps={steps},seed=0]", {"images": images, "iterations": steps}
        plain(story, f"control{axes}", 0.4 + place / 10, place, **values)
        helped(story, f"head{axes}", 0.7, 70 + place, "head", **values)
    return found_in(story)


def test_where_it_pays_is_drawn_over_images_and_over_steps(empty: Any) -> None:
    found = grid(empty, [(100, 200), (100, 400), (300, 200), (300, 400)])
    assert [arm.control and arm.control.name for arm in found.arms] == [
        f"control[images={images},steps={steps}]" for images in (100, 300) for steps in (200, 400)
    ]
    section = where_it_pays(found)
    assert section is not None
    assert [plot.caption.partition(";")[0] for plot in section.plots] == [
        "AP over labelled images",
        "AP over iterations",
    ]
    for plot, panels in zip(
        section.plots, (("200 iterations", "400 iterations"), ("100 labelled", "300 labelled")), strict=True
    ):
        assert all(panel in plot.svg for panel in panels)
        assert ("control" in plot.svg, "head" in plot.svg) == (True, True)
    assert section.sentences[0].startswith("head[images=100,steps=200] (100 labelled images, 200 iterations): ")


def test_where_nothing_varies_nothing_is_drawn(arm_story: Any) -> None:
    assert where_it_pays(found_in(arm_story)) is None


def test_where_only_images_vary_one_plot_is_drawn(empty: Any) -> None:
    section = where_it_pays(grid(empty, [(100, 200), (300, 200)]))
    assert section is not None
    assert len(section.plots) == 1
