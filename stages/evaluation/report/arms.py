"""Arms: one student, helped in different ways, each way against the same student without help, on the same images.

An arm is what a distilling stage made, its matrix without `seed`: `pkd` of `pkd[seed=0]` and `pkd[seed=1]`. Its control
is the plain training of the same student with equal labelled images, iterations, settings and seeds, whatever its name.
A plain training that differs in having more iterations is the control of equal time: a step with help costs more.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from deploy.gain import Resampled, resample
from stages.artifacts.checkpoint import DistilledCheckpoint, TrainedDetector
from stages.artifacts.reports import AccuracyRow
from stages.evaluation.report.comparison import differences
from stages.evaluation.report.estimate import Estimate, estimate
from stages.evaluation.report.evidence import Evidence, axes_of, stage_of
from stages.evaluation.report.wording import counted, listed, rounded


@dataclass(frozen=True)
class Run:
    """One training and what it reached."""

    trained: TrainedDetector
    row: AccuracyRow


@dataclass(frozen=True)
class Group:
    """The runs of one stage that differ in their seed alone."""

    name: str
    runs: Mapping[int, Run]
    """By seed."""

    @property
    def one(self) -> TrainedDetector:
        """Any of the trainings: what is asked of it is equal in all."""
        return next(iter(self.runs.values())).trained

    @property
    def seconds(self) -> float:
        """Mean time spent in training steps."""
        return fmean(run.trained.seconds for run in self.runs.values())

    @property
    def ap(self) -> float:
        """Mean AP over seeds."""
        return fmean(run.row.statistics["ap"] or 0.0 for run in self.runs.values())


@dataclass(frozen=True)
class Arm:
    """One way of helping. Where `refused` says why, nothing was compared."""

    group: Group
    control: Group | None = None
    gain: Estimate | None = None
    """Over the control of equal iterations."""
    longer: Group | None = None
    """The plain training that comes nearest to taking as many seconds, or more."""
    gain_over_longer: Estimate | None = None
    refused: str = ""

    @property
    def name(self) -> str:
        return self.group.name

    @property
    def methods(self) -> str:
        """Which methods helped."""
        return " + ".join(str(method["name"]) for method in _methods(self).values())

    @property
    def favoured(self) -> bool:
        """Whether even the longer control had less time than the arm."""
        return self.longer is not None and self.longer.seconds < self.group.seconds

    def to_dict(self) -> dict[str, Any]:
        """For report.json."""
        trained = self.group.one
        told = {"images": trained.images, "iterations": trained.iterations, "seconds": rounded(self.group.seconds, 1)}
        return {
            "name": self.name,
            "methods": self.methods,
            **told,
            "seeds": list(self.group.runs),
            "ap": _aps(self.group),
            "refused": self.refused,
            "control": _told(self.control),
            "gain": self.gain.to_dict() if self.gain else None,
            "equal_time_control": _told(self.longer),
            "gain_over_equal_time": self.gain_over_longer.to_dict() if self.gain_over_longer else None,
        }


@dataclass(frozen=True)
class Experiment:
    """All arms, and every arm against every other of the same control, on the seeds that both were trained with."""

    arms: Sequence[Arm]
    between: Mapping[tuple[str, str], Estimate]
    """Gain of the first over the second."""
    images: int
    samples: int

    @property
    def ablations(self) -> list[tuple[Arm, Arm, Estimate]]:
        """Arms beside arms that lack a part of their help and have nothing else: what the part adds."""
        arms = {arm.name: arm for arm in self.arms}
        pairs = ((arms[whole], arms[part], gain) for (whole, part), gain in self.between.items())
        return [(whole, part, gain) for whole, part, gain in pairs if lacks(_methods(part), _methods(whole))]

    @property
    def compared(self) -> list[Arm]:
        """Those with a control."""
        return [arm for arm in self.arms if arm.gain is not None]


def experiment(evidence: Evidence, samples: int = 1000) -> Experiment | None:
    """Find the arms and compare them; None where there are fewer than two."""
    unmeasured, groups = _groups(evidence)
    helped = [group for group in groups if isinstance(group.one, DistilledCheckpoint)]
    if len(helped) < 2:
        return None
    teachers = {key for group in helped for run in group.runs.values() for key in _teachers(run.trained)}
    plain = [group for group in groups if group not in helped and group.one.key not in teachers]
    rows = {run.row.key: run.row for group in [*helped, *plain] for run in group.runs.values()}
    drawn = resample([evidence.results(row) for row in rows.values()], evidence.data.annotations("val"), samples)
    measured = _Measured(drawn, {key: place for place, key in enumerate(rows)})
    arms = [_arm(group, plain, measured, unmeasured, evidence) for group in helped]
    known = [arm for arm in arms if arm.gain]
    between = {
        (a.name, b.name): measured.gain(a.group, b.group)
        for a in known
        for b in known
        if a is not b and a.control is b.control and a.group.runs.keys() & b.group.runs.keys()
    }
    return Experiment(arms, between, drawn.images, samples)


@dataclass(frozen=True, eq=False)
class _Measured:
    drawn: Resampled
    place: Mapping[str, int]

    def gain(self, better: Group, other: Group) -> Estimate:
        """Of one group over another, on the seeds of both."""
        seeds = [seed for seed in better.runs if seed in other.runs]
        ours, theirs = ([self.place[group.runs[seed].row.key] for seed in seeds] for group in (better, other))
        drawn = self.drawn
        return estimate(
            drawn.ap_M[ours] - drawn.ap_M[theirs], np.asarray(drawn.drawn_MS[ours] - drawn.drawn_MS[theirs])
        )


def _groups(evidence: Evidence) -> tuple[dict[str, list[str]], list[Group]]:
    """Trainings by stage and matrix values; and for each group which nodes of it were not measured."""
    found: dict[str, dict[int, Run]] = {}
    unmeasured: dict[str, list[str]] = {}
    for trained in evidence.checkpoints:
        if not trained.iterations or trained.metrics is None:  # only loaded, or pruned from one that was trained
            continue
        name = group_of(trained.name)
        row = _row(trained, evidence)
        if row is None:
            unmeasured.setdefault(name, []).append(trained.name)
        else:
            found.setdefault(name, {})[trained.seed] = Run(trained, row)
    return unmeasured, [Group(name, runs) for name, runs in found.items()]


def group_of(node: str, without: Collection[str] = ("seed",)) -> str:
    """The name of a node without some axes: `control[images=100]` of `control[images=100,seed=0]`."""
    axes = ",".join(axis for axis in axes_of(node).split(",") if axis and axis.partition("=")[0] not in without)
    return f"{stage_of(node)}[{axes}]" if axes else stage_of(node)


def _row(trained: TrainedDetector, evidence: Evidence) -> AccuracyRow | None:
    """Its own AP, or that of the student pruned from it."""
    own = evidence.row(trained.key)
    pruned = (row for row in evidence.rows if row.kind == "pruned" and evidence.training(row.key) is trained)
    row = own or next(pruned, None)
    return row if row is not None and row.statistics.get("ap") is not None else None


def _teachers(trained: TrainedDetector) -> list[str]:
    """Keys of those who taught it."""
    return [one.key for one in trained.teachers] if isinstance(trained, DistilledCheckpoint) else []


def _arm(
    group: Group, plain: Sequence[Group], measured: _Measured, unmeasured: Mapping[str, list[str]], evidence: Evidence
) -> Arm:
    """Find its controls, or say in a sentence why there is none."""
    if missing := unmeasured.get(group.name):
        return Arm(group, refused=f"no AP of {listed(missing)} is among the rows")
    same = [other for other in plain if other.one.detector == group.one.detector]
    if not same:
        return Arm(group, refused=f"no plain training of its student ({group.one.detector['name']}) is wired in")
    equal = [other for other in same if not _unequal(group, other, same_length=True)]
    named = [other for other in equal if stage_of(other.name) == evidence.roles.control]
    if not equal:
        nearest = min(same, key=lambda other: len(_unequal(group, other, same_length=True)))
        differing = "; ".join(_unequal(group, nearest, same_length=True))
        return Arm(group, refused=f"no control of equal budget: {nearest.name}, the nearest, differs in {differing}")
    if len(equal) > 1 and len(named) != 1:
        names = listed([other.name for other in equal])
        return Arm(group, refused=f"{names} could each be its control; name one with `control`")
    control = (named or equal)[0]
    if lonely := [str(seed) for seed in group.runs if seed not in control.runs]:
        return Arm(group, control, refused=f"{control.name} was not trained with seed {listed(lonely)}")
    longer = _longer(group, control, same)
    over_longer = measured.gain(group, longer) if longer else None
    return Arm(group, control, measured.gain(group, control), longer, over_longer)


def _longer(group: Group, control: Group, same: Sequence[Group]) -> Group | None:
    """Of the plain trainings with more iterations and the same seeds, the shortest that took as long, else the longest."""
    more = [
        other
        for other in same
        if other.one.iterations > control.one.iterations
        and group.runs.keys() <= other.runs.keys()
        and not _unequal(group, other, same_length=False)
    ]
    enough = [other for other in more if other.seconds >= group.seconds]
    by_time = sorted(enough or more, key=lambda other: other.seconds, reverse=not enough)
    return by_time[0] if by_time else None


def _unequal(group: Group, other: Group, same_length: bool) -> list[str]:
    """What differs beside help and seed, over all runs."""
    found = {
        difference: None
        for run in group.runs.values()
        for difference in differences(run.trained, other.one, same_length)
        if not difference.startswith("seed (")
    }
    return list(found)


def _methods(arm: Arm) -> dict[str, dict[str, Any]]:
    trained = arm.group.one
    assert isinstance(trained, DistilledCheckpoint)
    return trained.methods


def lacks(part: Mapping[str, Any], whole: Mapping[str, Any]) -> bool:
    """Whether settings of methods differ from others only in methods that are not there, and in what is 0 or off."""
    if part == whole or not part.keys() <= whole.keys():
        return False
    flat = [
        {f"{name}.{key}": value for name, one in all_.items() for key, value in one.items()} for all_ in (part, whole)
    ]
    return all(not value or value == flat[1].get(key) for key, value in flat[0].items())


def _aps(group: Group) -> list[float | None]:
    return [rounded(run.row.statistics["ap"], 4) for run in group.runs.values()]


def _told(group: Group | None) -> dict[str, Any] | None:
    if group is None:
        return None
    told = {"iterations": group.one.iterations, "seconds": rounded(group.seconds, 1)}
    return {"name": group.name, "seeds": list(group.runs), "ap": _aps(group), **told}


def verdict(found: Experiment) -> str:
    """How many arms show a gain, and which gains most: the best of many is partly the luckiest."""
    compared = found.compared
    if not compared:
        return f"none of {counted(len(found.arms), 'arm')} could be compared with a control"
    shown = [arm for arm in compared if arm.gain and arm.gain.shown]
    best = max(compared, key=lambda arm: arm.gain.mean if arm.gain else 0.0)
    assert best.gain is not None
    share = f"{len(shown) or 'none'} of {counted(len(found.arms), 'arm')}"
    return f"a gain over the control is shown by {share}; the largest is that of {best.name}: {best.gain.sentence}"
