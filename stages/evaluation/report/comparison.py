"""The gain over the control: the same student without help, seed by seed, with an interval over images.

The interval is that of a paired bootstrap over images, one for each seed: it covers the choice of validation images. What
another training seed would do shows in the spread over seeds, where there are several.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

from deploy.gain import Gain, paired_bootstrap
from stages.artifacts.checkpoint import TrainedDetector
from stages.artifacts.reports import AccuracyRow
from stages.evaluation.report.evidence import Evidence, axes_of, stage_of
from stages.evaluation.report.wording import ap, counted, interval, listed, rounded, seconds, signed_ap

# Settings that cannot change what is learnt, or that the checkpoint itself tells better.
_IRRELEVANT = {
    "validate_every",
    "checkpoint_every",
    "log_every",
    "workers",
    "cache",
    "device",
    "steps",
    "epochs",
    "images",
    "seed",
}


@dataclass(frozen=True)
class Pair:
    """A student and its control, measured on the same images."""

    student: AccuracyRow
    control: AccuracyRow
    gain: Gain
    trained: tuple[TrainedDetector, TrainedDetector] | None
    """How both were trained, student first, where their checkpoints are known."""


@dataclass(frozen=True)
class Comparison:
    """The student against one control stage. Without pairs nothing was compared, and `missing` says why."""

    control: str
    pairs: tuple[Pair, ...] = ()
    missing: str = ""
    unpaired: Mapping[str, str] = field(default_factory=dict)
    """Nodes of either stage that are in no pair, and why: their seeds might have told another story."""

    @property
    def mean(self) -> float | None:
        """Mean gain over pairs."""
        return fmean(pair.gain.difference for pair in self.pairs) if self.pairs else None

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The hull of the pairs' intervals: of one pair its interval, of several no narrower than any of theirs."""
        if not self.pairs:
            return None
        return min(pair.gain.low for pair in self.pairs), max(pair.gain.high for pair in self.pairs)

    @property
    def spread(self) -> float | None:
        """Standard deviation of the gain over pairs; None for fewer than two."""
        return stdev(pair.gain.difference for pair in self.pairs) if len(self.pairs) > 1 else None

    @property
    def shown(self) -> bool:
        """Whether every node has found its partner, and every pair's interval lies above 0."""
        return self.bounds is not None and self.bounds[0] > 0 and not self.unpaired

    @property
    def left_out(self) -> str:
        """Which nodes were not compared, and why; empty where all were."""
        told = [f"{name} ({why})" for name, why in self.unpaired.items()]
        return f"not compared: {listed(told)}" if told else ""

    @property
    def shorter(self) -> list[str]:
        """The pairs whose control was trained for less time than its student: `120 s against 180 s`."""
        known = [pair.trained for pair in self.pairs if pair.trained]
        return [f"{b.seconds:.0f} s against {a.seconds:.0f} s" for a, b in known if b.seconds < a.seconds]

    @property
    def untimed(self) -> list[str]:
        """Students of pairs for which a time of training is not known."""
        return [p.student.name for p in self.pairs if not (p.trained and all(one.seconds for one in p.trained))]

    @property
    def _noun(self) -> str:
        """Pairs are seeds, unless a matrix has made several of one seed."""
        seeds = [pair.trained[0].seed for pair in self.pairs if pair.trained]
        return "seed" if len(set(seeds)) == len(seeds) else "pair"

    @property
    def sentence(self) -> str:
        """`gain 2.1 AP, 95 % interval [1.2, 3.0], 3 seeds`, or that none is shown."""
        if self.mean is None or self.bounds is None:
            return f"gain over {self.control} not measured: {self.missing}"
        number = f"{ap(self.mean)} AP" if self.shown else f"difference {signed_ap(self.mean)} AP"
        confidence = 100 * self.pairs[0].gain.confidence
        found = (
            f"{number}, {confidence:.0f} % interval {interval(*self.bounds)}, {counted(len(self.pairs), self._noun)}"
        )
        if self.spread is not None:
            found += f" (sd {ap(self.spread)} over {self._noun}s)"
        if self.unpaired:
            found += f"; {self.left_out}"
        if self.shown:
            return f"gain {found}"
        if self.bounds[1] < 0:
            return f"worse than its control: {found}"
        return f"{'no gain' if self.bounds[0] <= 0 else 'a gain of every seed is not'} shown: {found}"

    def to_dict(self) -> dict[str, Any]:
        """For report.json: AP from 0 to 1."""
        low, high = self.bounds or (None, None)
        return {
            "control": self.control,
            "mean": rounded(self.mean),
            "low": rounded(low),
            "high": rounded(high),
            "spread": rounded(self.spread),
            "shown": self.shown,
            "sentence": self.sentence,
            "unpaired": dict(self.unpaired),
            "pairs": [
                {
                    "student": pair.student.name,
                    "control": pair.control.name,
                    "student_ap": rounded(pair.gain.ap_b),
                    "control_ap": rounded(pair.gain.ap_a),
                    "gain": rounded(pair.gain.difference),
                    "low": rounded(pair.gain.low),
                    "high": rounded(pair.gain.high),
                    "confidence": pair.gain.confidence,
                    "samples": pair.gain.samples,
                    "images": pair.gain.images,
                }
                for pair in self.pairs
            ],
        }


def compare(evidence: Evidence, control: str, samples: int = 1000) -> Comparison:
    """Pair the student's rows with those of a control stage and bootstrap each pair."""
    stages = (evidence.roles.student, control)
    measured = {
        stage: [row for row in evidence.of_stage(stage) if row.statistics.get("ap") is not None] for stage in stages
    }
    if absent := [stage for stage in stages if not measured[stage]]:
        return Comparison(control, missing=f"no AP of {listed(absent)} is among the rows")
    annotations = evidence.data.annotations("val")
    partners, unpaired = _paired(measured[stages[0]], measured[control], evidence)
    for name in (name for stage in stages for name in evidence.nodes_of(stage)):
        if all(name != row.name for rows in measured.values() for row in rows):
            unpaired[name] = "no AP"
    pairs = []
    for student, other in partners:
        gain = paired_bootstrap(evidence.results(other), evidence.results(student), annotations, samples)
        own, others = evidence.training(student.key), evidence.training(other.key)
        pairs.append(Pair(student, other, gain, (own, others) if own and others else None))
    missing = "" if pairs else "; ".join(f"{name}: {why}" for name, why in unpaired.items())
    return Comparison(control, tuple(pairs), missing, unpaired)


def _paired(
    students: list[AccuracyRow], controls: list[AccuracyRow], evidence: Evidence
) -> tuple[list[tuple[AccuracyRow, AccuracyRow]], dict[str, str]]:
    """Equal matrix values belong together; else the one control of the same training seed. And who is left, and why."""
    pairs: list[tuple[AccuracyRow, AccuracyRow]] = []
    unpaired: dict[str, str] = {}
    matched: set[str] = set()
    for student in students:
        same = _partners(student, controls, evidence)
        matched |= {row.name for row in same}
        if len(same) == 1:
            pairs.append((student, same[0]))
        elif same:
            unpaired[student.name] = f"{listed([row.name for row in same])} match, which is ambiguous"
        else:
            unpaired[student.name] = f"no {stage_of(controls[0].name)} has its matrix values or seed"
    alone = (row.name for row in controls if row.name not in matched)
    return pairs, unpaired | dict.fromkeys(alone, f"no {stage_of(students[0].name)} has its matrix values or seed")


def _partners(student: AccuracyRow, controls: list[AccuracyRow], evidence: Evidence) -> list[AccuracyRow]:
    def seed(row: AccuracyRow) -> int | None:
        trained = evidence.training(row.key)
        return trained.seed if trained else None

    same = [row for row in controls if axes_of(row.name) == axes_of(student.name)]
    return same or [row for row in controls if seed(row) is not None and seed(row) == seed(student)]


def fairness(comparison: Comparison, same_length: bool) -> list[str]:
    """What differs between the student's training and its control's beside the teacher's help, in words.

    `same_length` says that both were meant to train for the same number of iterations.
    """
    known = [pair.trained for pair in comparison.pairs if pair.trained]
    if not known:
        return []
    found: dict[str, None] = {}
    for student, control in known:
        found |= dict.fromkeys(differences(student, control, same_length))
    recorded = all(trained.provenance.get("settings") for pair in known for trained in pair)
    checked = "detector, labelled images, seed" + (", iterations" if same_length else "")
    checked += " and settings of training" if recorded else " (their other settings are not recorded)"
    if found:
        return [f"the comparison is not like with like, student and {comparison.control} differ in: {'; '.join(found)}"]
    return (
        [f"student and {comparison.control} have the same {checked}; only the student is helped"] if same_length else []
    )


def differences(student: TrainedDetector, control: TrainedDetector, same_length: bool) -> Iterator[str]:
    fields = {"labelled images": "images", "seed": "seed"} | ({"iterations": "iterations"} if same_length else {})
    for name, attribute in fields.items():
        a, b = getattr(student, attribute), getattr(control, attribute)
        if a != b:
            yield f"{name} ({a:,} against {b:,})"
    settings = (dict(one.provenance.get("settings", {})) for one in (student, control))
    own, other = ({k: v for k, v in one.items() if k not in _IRRELEVANT} for one in settings)
    shared = own.keys() & other.keys()
    pairs = [(_flat(student.detector, "detector"), _flat(control.detector, "detector"))]
    pairs += [(_flat(own[name], name), _flat(other[name], name)) for name in sorted(shared)]
    for a_values, b_values in pairs:
        for name in sorted(a_values.keys() | b_values.keys()):
            if a_values.get(name) != b_values.get(name):
                yield f"{name} ({a_values.get(name)} against {b_values.get(name)})"


def _flat(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {name: value}
    return {key: leaf for part, one in value.items() for key, leaf in _flat(one, f"{name}.{part}").items()}


def times(comparison: Comparison) -> list[str]:
    """How long student and equal-time control were trained, and plainly if the control was given less."""
    known = [pair.trained for pair in comparison.pairs if pair.trained]
    if not known:
        return []
    own, other = ([pair[side] for pair in known] for side in (0, 1))
    mean = "on average " if len(known) > 1 else ""
    ours, theirs = (fmean(one.seconds for one in side) for side in (own, other))
    return [
        f"training took {mean}{seconds(ours, theirs)} and {_iterations(own)} for the student, "
        f"{seconds(theirs, ours)} and {_iterations(other)} for {comparison.control}",
        *doubts(comparison),
    ]


def doubts(comparison: Comparison) -> list[str]:
    """Why an equal-time control is none: it had less time than the student, or nobody knows."""
    words = []
    if comparison.shorter:
        words.append(
            f"the equal-time control was in fact given less time than the student ({listed(comparison.shorter)}), "
            "which favours the student: give it more iterations"
        )
    if comparison.untimed:
        words.append(f"the times of training of {listed(comparison.untimed)} and its control are not both known")
    return words


def _iterations(trained: list[TrainedDetector]) -> str:
    return listed([f"{count:,}" for count in sorted({one.iterations for one in trained})]) + " iterations"
