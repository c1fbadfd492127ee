"""Gates: what a release must reach, judged on what was measured. What was not measured has not passed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

from pydantic import Field

from pipeline.config import BaseConfig
from stages.artifacts.reports import AccuracyRow, Gate, LatencyRow
from stages.evaluation.report.chain import Hop
from stages.evaluation.report.comparison import Comparison, doubts
from stages.evaluation.report.evidence import Evidence
from stages.evaluation.report.wording import listed


class Gates(BaseConfig):
    """Gates of a report; what is not given is not asked. AP from 0 to 1."""

    min_teacher_ap: float | None = Field(default=None, ge=0, le=1)
    """Least AP of every teacher: below it there is little to teach."""
    min_ap: float | None = Field(default=None, ge=0, le=1)
    """Least AP of every exported model."""
    min_gain_over_control: float | None = Field(default=None, ge=-1, le=1)
    """Least gain of the student over its control: the mean over all seeds, not the lower end of its interval."""
    min_gain_over_equal_time_control: float | None = Field(default=None, ge=-1, le=1)
    """Least mean gain of the student over the control that was trained for at least as long; if that had less, it fails."""
    gain_interval_excludes_zero: bool = False
    """Whether the 95 % interval of the gain over the control must lie above 0, that of every seed."""
    max_ap_drop: float | None = Field(default=None, ge=0, le=1)
    """Largest loss of AP at any hop after the training: pruning, export."""
    max_p99_ms: float | None = Field(default=None, gt=0)
    """Largest 99th percentile of the latency from file to detections, of every model that was benchmarked;
    of a sweep over batches and threads that of the first."""
    max_megabytes: float | None = Field(default=None, gt=0)
    """Largest file of every exported model, in MB of 1,000,000 bytes."""


@dataclass(frozen=True)
class _Value:
    """A measured number and whose it is."""

    name: str
    value: float | None
    doubt: str = ""
    """Why the number, or its absence, cannot pass a gate."""


@dataclass(frozen=True)
class _Unit:
    """How a gate prints its numbers."""

    suffix: str
    digits: int
    scale: float = 1

    def text(self, value: float, extra: int = 0) -> str:
        return f"{self.scale * value:.{self.digits + extra}f} {self.suffix}"


_AP, _MS, _MB = _Unit("AP", 1, 100), _Unit("ms", 2), _Unit("MB", 2)


def judge(
    gates: Gates, evidence: Evidence, hops: Sequence[Hop], gain: Comparison, equal_time: Comparison
) -> list[Gate]:
    """Every gate that is asked for, in the order of the settings; the comparisons are with the two controls."""
    return list(_judged(gates, evidence, hops, gain, equal_time))


def _judged(
    gates: Gates, evidence: Evidence, hops: Sequence[Hop], gain: Comparison, equal_time: Comparison
) -> Iterator[Gate]:
    exported = evidence.exported
    if gates.min_teacher_ap is not None:
        teachers = _aps(evidence.of_stage(evidence.roles.teacher))
        yield _least("min_teacher_ap", gates.min_teacher_ap, teachers, f"no AP of {evidence.roles.teacher}")
    if gates.min_ap is not None:
        yield _least("min_ap", gates.min_ap, _aps(exported), "no AP of an exported model")
    if gates.min_gain_over_control is not None:
        yield _least("min_gain_over_control", gates.min_gain_over_control, _mean(gain), gain.missing)
    if gates.min_gain_over_equal_time_control is not None:
        mean = _mean(equal_time, doubts(equal_time))
        asked = gates.min_gain_over_equal_time_control
        yield _least("min_gain_over_equal_time_control", asked, mean, equal_time.missing)
    if gates.gain_interval_excludes_zero:
        yield Gate(
            name="gain_interval_excludes_zero",
            asked="the interval of the gain lies above 0",
            measured=gain.sentence,
            passed=gain.shown,
        )
    if gates.max_ap_drop is not None:
        lost = [_Value(f"{hop.source} to {hop.target}", hop.lost) for hop in hops if hop.kind == "loss"]
        yield _most("max_ap_drop", gates.max_ap_drop, lost, "no hop after the training", _AP)
    if gates.max_p99_ms is not None:
        p99 = [_p99(row) for row in evidence.quoted_latency]
        gate = _most("max_p99_ms", gates.max_p99_ms, p99, "no latency", _MS)
        again = "" if gate.passed else evidence.measure_again
        yield gate.model_copy(update={"measured": "; ".join(filter(None, (gate.measured, again)))})
    if gates.max_megabytes is not None:
        sizes = [_Value(row.name, row.bytes / 1e6) for row in exported]
        sizes = sizes or [_Value(model.name, model.bytes / 1e6) for model in evidence.models]
        yield _most("max_megabytes", gates.max_megabytes, sizes, "no size of an exported model", _MB)


def _aps(rows: Sequence[AccuracyRow]) -> list[_Value]:
    return [_Value(row.name, row.statistics.get("ap")) for row in rows]


def _mean(comparison: Comparison, others: Sequence[str] = ()) -> list[_Value]:
    """The mean gain; a mean over some of the seeds is not the one that was asked for."""
    if comparison.mean is None:
        return []
    return [_Value("mean gain", comparison.mean, "; ".join([*filter(None, [comparison.left_out]), *others]))]


def _p99(row: LatencyRow) -> _Value:
    step = row.steps.get("end_to_end", {})
    value = step.get("p99")
    if value is None:
        return _Value(row.name, None, f"no p99: {step.get('n') or 0:.0f} samples are too few, it needs 1,000")
    reasons = "; ".join(row.evidence.get("reasons", ())) or "the benchmark says so"
    return _Value(row.name, value, "" if row.reliable else f"unreliable: {reasons}")


def _least(name: str, asked: float, values: Sequence[_Value], missing: str) -> Gate:
    return _gate(name, f"at least {_AP.text(asked)}", values, missing, _AP, lambda value: value >= asked, asked)


def _most(name: str, asked: float, values: Sequence[_Value], missing: str, unit: _Unit) -> Gate:
    return _gate(name, f"at most {unit.text(asked)}", values, missing, unit, lambda value: value <= asked, asked)


def _gate(
    name: str,
    demand: str,
    values: Sequence[_Value],
    missing: str,
    unit: _Unit,
    passes: Callable[[float], bool],
    asked: float,
) -> Gate:
    """Passed when there are values and every one of them passes; `measured` tells of those that fail."""

    def told(one: _Value) -> str:
        if one.value is None:
            return f"{one.name}: {one.doubt or 'not measured'}"
        # 59.97 that fails "at least 60.0" must not read 60.0.
        close = not passes(one.value) and unit.text(one.value) == unit.text(asked)
        return f"{one.name}: {unit.text(one.value, 3 if close else 0)}" + (f" ({one.doubt})" if one.doubt else "")

    failing = [one for one in values if one.value is None or one.doubt or not passes(one.value)]
    told_of = failing or sorted(values, key=lambda one: abs((one.value or 0) - asked))[:1]  # the closest call
    measured = "; ".join(told(one) for one in told_of) or f"not measured: {missing}"
    if len(values) > 1:
        measured += f" ({len(failing)} of {len(values)} fail)" if failing else f" (the closest of {len(values)})"
    return Gate(name=name, asked=demand, measured=measured, passed=bool(values) and not failing)


def failure(gate: Gate) -> str:
    """A failed gate as a sentence."""
    return f"gate {gate.name}: asked {gate.asked}; {gate.measured}"


def verdict(gates: Sequence[Gate]) -> str:
    """One sentence over all gates."""
    failed = [gate.name for gate in gates if not gate.passed]
    if not gates:
        return "No gates were asked for"
    if failed:
        return f"Failed: {listed(failed)}"
    return "Passed: the one gate" if len(gates) == 1 else f"Passed: all {len(gates)} gates"


def junit(gates: Sequence[Gate]) -> str:
    """JUnit XML, one test case a gate, which CI systems show."""
    failed = sum(not gate.passed for gate in gates)
    counts = {"tests": str(len(gates)), "failures": str(failed), "errors": "0", "skipped": "0"}
    root = ElementTree.Element("testsuites", counts)
    suite = ElementTree.SubElement(root, "testsuite", {"name": "headstart.gates", **counts})
    for gate in gates:
        case = ElementTree.SubElement(suite, "testcase", {"classname": "headstart.gates", "name": gate.name})
        if gate.passed:
            ElementTree.SubElement(case, "system-out").text = f"asked {gate.asked}; {gate.measured}"
        else:
            told = failure(gate)
            ElementTree.SubElement(case, "failure", {"message": told, "type": "gate"}).text = told
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"
