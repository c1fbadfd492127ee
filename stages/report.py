"""Say whether the student is good enough to ship, and why to believe it: one page, Markdown, JSON, JUnit; gates decide."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from pipeline.config import BaseConfig
from pipeline.listing import columns
from stages.artifacts.checkpoint import TrainedDetector
from stages.artifacts.dataset import Dataset
from stages.artifacts.exported_model import ExportedModel
from stages.artifacts.reports import AccuracyReport, Gate, LatencyReport, Report
from stages.evaluation.report.arms import Experiment, experiment
from stages.evaluation.report.arms import verdict as arms_verdict
from stages.evaluation.report.chain import Chain, Hop, chains, distinct, explained, hops, narrowed
from stages.evaluation.report.comparison import Comparison, compare
from stages.evaluation.report.evidence import Evidence, Roles, stage_of
from stages.evaluation.report.gates import Gates, failure, judge, junit, verdict
from stages.evaluation.report.page import Page, Section, html, markdown
from stages.evaluation.report.sections import audit, results
from stages.evaluation.report.sections.experiment import arms as arms_section
from stages.evaluation.report.sections.experiment import arms_table, where_it_pays
from stages.evaluation.report.sections.loading import loading
from stages.evaluation.report.sections.tradeoff import tradeoff
from stages.evaluation.report.teaching import teaching
from stages.evaluation.report.wording import ap, megabytes, milliseconds, rounded, sentence, signed_ap


class Config(BaseConfig):
    """Who plays which part, what is asked, how much is shown."""

    teacher: str = "teacher"
    """Stage that trained the teacher; a stage with a matrix stands for all its nodes."""
    student: str = "student"
    """Stage that gives the student as it is exported: the pruning one."""
    control: str = "control"
    """Stage that trained the same student without help."""
    equal_time_control: str = "control_equal_time"
    """Stage that trained the same student without help for at least as many seconds."""
    gates: Gates = Gates()
    """What must be reached; a gate that fails, or whose number was not measured, ends the command with exit code 3."""
    images: int = Field(default=12, ge=0)
    """Validation images to show with boxes."""


def check(config: Config, wired: Mapping[str, Any]) -> Iterable[str]:
    """Parts given by name are played by somebody, and a gate has something to judge."""
    stages = {stage_of(node.name) for node in wired.get("checkpoints", ())}
    parts = {"teacher": config.teacher, "student": config.student, "control": config.control}
    parts["equal_time_control"] = config.equal_time_control
    for part, stage in parts.items():
        if part in config.model_fields_set and stage not in stages:
            yield f"{part}: no stage {stage} is wired to checkpoints; there are: {', '.join(sorted(stages)) or 'none'}"
    gates = config.gates
    wanted = asked_about(gates)
    for part in wanted:
        if part not in config.model_fields_set and parts[part] not in stages:
            yield f"gates: one asks about the {part}, and no stage {parts[part]} is wired to checkpoints; set {part}"


def asked_about(gates: Gates) -> list[str]:
    """Parts without which a gate has nothing to judge."""
    gain = gates.min_gain_over_control is not None or gates.gain_interval_excludes_zero
    equal_time = gates.min_gain_over_equal_time_control is not None
    wanted = {
        "teacher": gates.min_teacher_ap is not None,
        "student": gain or equal_time,
        "control": gain,
        "equal_time_control": equal_time,
    }
    return [part for part, asked in wanted.items() if asked]


def expected(config: Config, evidence: Evidence, part: str) -> bool:
    """Whether anybody looks for this part: it is wired in, named in the config, or a gate asks about it."""
    named = part in config.model_fields_set or part in asked_about(config.gates)
    return named or bool(evidence.nodes_of(getattr(config, part)))


def run(
    config: Config,
    directory: Path,
    *,
    data: Dataset,
    accuracy: list[AccuracyReport],
    latency: list[LatencyReport],
    checkpoints: list[TrainedDetector],
    models: list[ExportedModel],
) -> Report:
    """Write report.html, report.md, report.json, junit.xml and summary.txt; failed gates are the artifact's failures."""
    evidence = Evidence(
        data,
        accuracy,
        latency,
        checkpoints,
        models,
        Roles(config.teacher, config.student, config.control, config.equal_time_control),
    )
    findings = find(config, evidence)
    page = written_page(config, evidence, findings)
    files = {
        "report.html": html(page),
        "report.md": markdown(page),
        "report.json": json.dumps(recorded(evidence, findings, page), indent=1) + "\n",
        "junit.xml": junit(findings.gates),
        "summary.txt": summary(evidence, findings, page),
    }
    for name, text in files.items():
        (directory / name).write_text(text, encoding="utf-8")
    failures = tuple(failure(gate) for gate in findings.gates if not gate.passed)
    return Report(gates=tuple(findings.gates), failures=failures)


@dataclass(frozen=True)
class Findings:
    """What was found out from the evidence, before it is told."""

    chains: Sequence[Chain]
    hops: Sequence[Hop]
    """Of all chains, each once."""
    gain: Comparison
    longer: Comparison
    """The gain over the control of equal time."""
    told: Sequence[Comparison | None]
    """Both comparisons; None for one that nobody expects."""
    experiment: Experiment | None
    ships: bool
    """False for an experiment alone, which has arms and no student to ship."""
    gates: Sequence[Gate]


def find(config: Config, evidence: Evidence) -> Findings:
    """Compare all that can be compared, and judge."""
    found = chains(evidence)
    all_hops = distinct([hop for chain in found for hop in hops(chain, evidence)])
    gain = compare(evidence, config.control)
    longer = compare(evidence, config.equal_time_control)
    arms = experiment(evidence)
    told = [
        comparison if expected(config, evidence, part) else None
        for part, comparison in (("control", gain), ("equal_time_control", longer))
    ]
    ships = arms is None or expected(config, evidence, "student")
    gates = judge(config.gates, evidence, all_hops, gain, longer)
    return Findings(found, all_hops, gain, longer, told if ships else [None, None], arms, ships, gates)


def written_page(config: Config, evidence: Evidence, findings: Findings) -> Page:
    """The report, section by section, in the order in which a reader decides."""
    return Page(
        title="Headstart report",
        verdict=verdict(findings.gates),
        passed=all(gate.passed for gate in findings.gates) if findings.gates else None,
        lead=lead(findings, evidence),
        facts=facts(evidence, findings.gain),
        gates=findings.gates,
        sections=[
            *experiment_sections(findings.experiment),
            results.models(evidence, findings.ships),
            *([weighed] if (weighed := tradeoff(evidence)) else []),
            *(student_sections(config, evidence, findings) if findings.ships else []),
            audit.training(evidence),
            *([seen] if (seen := loading(evidence)) else []),
            *([taught] if (taught := teaching(evidence)) else []),
            *([audit.latency(evidence), audit.proofs(evidence)] if findings.ships else []),
            audit.images(evidence, config.images),
            audit.provenance(evidence),
        ],
    )


def experiment_sections(found: Experiment | None) -> list[Section]:
    """The arms, and where distillation pays if that was varied."""
    if found is None:
        return []
    pays = where_it_pays(found)
    return [arms_section(found), *([pays] if pays else [])]


def student_sections(config: Config, evidence: Evidence, findings: Findings) -> list[Section]:
    """What is told of the one student that ships."""
    return [
        results.chain(findings.chains, evidence),
        *([results.gain(*findings.told)] if any(findings.told) else []),
        *([results.advantage(evidence)] if expected(config, evidence, "teacher") else []),
        results.classes(evidence),
    ]


def recorded(evidence: Evidence, findings: Findings, page: Page) -> dict[str, Any]:
    """All numbers, for report.json."""
    longer = findings.told[1]
    arms = findings.experiment
    return {
        "verdict": page.verdict,
        "rows": [row_record(evidence, index) for index in range(len(evidence.rows))],
        "gates": [gate.model_dump() for gate in findings.gates],
        "hops": [
            {
                **{
                    name: rounded(value) if isinstance(value, float) else value
                    for name, value in hop.model_dump().items()
                },
                "lost_by_size": {size: rounded(value) for size, value in hop.lost_by_size},
            }
            for hop in findings.hops
        ],
        "gain": {**findings.gain.to_dict(), "equal_time": longer.to_dict() if longer else None},
        "arms": [arm.to_dict() for arm in arms.arms] if arms else [],
        "arms_between": [
            {"arm": a, "other": b, **gain.to_dict()} for (a, b), gain in (arms.between if arms else {}).items()
        ],
    }


def lead(findings: Findings, evidence: Evidence) -> list[str]:
    """What to know before all else: how the arms did, the gain over both controls, what the shipped file's hops lost."""
    known = [one for one in findings.told if one]
    compared = [f"against {one.control}: {one.sentence}" for one in known if one.pairs]
    arms = [arms_verdict(findings.experiment)] if findings.experiment else []
    shipped = hops(findings.chains[0], evidence) if findings.ships and findings.chains else []
    lost = [*explained(shipped)[-1:], *narrowed(findings.hops)] if shipped else []
    return [*arms, *(compared or [one.sentence for one in known[:1]]), *lost]


def facts(evidence: Evidence, gain: Comparison) -> list[tuple[str, str]]:
    """The numbers to see at once."""
    row = results.shipped(evidence)
    if row is None:
        return []
    found = [(ap(row.statistics.get("ap")), f"AP of {row.name}")]
    if gain.mean is not None:
        found.append((signed_ap(gain.mean), f"AP over {gain.control}"))
    found.append((f"{megabytes(row.bytes)} MB", f"{row.parameters:,} parameters"))
    timed = evidence.latency_of(row)
    if timed is not None:
        p50 = timed.steps["end_to_end"].get("p50")
        doubt = "" if timed.reliable else " (unreliable)"
        found.append((f"{milliseconds(p50)} ms", f"an image, p50, file to detections{doubt}"))
    return found


def row_record(evidence: Evidence, index: int) -> dict[str, Any]:
    """One measured model for report.json, with its latency where that was measured."""
    row = evidence.rows[index]
    record = row.model_dump(mode="json", exclude={"results"})
    for table in ("statistics", "per_class"):
        record[table] = {name: rounded(value) for name, value in record[table].items()}
    timed = evidence.latency_of(row)
    measured = {"steps", "threads", "flops", "peak_memory_mb", "reliable", "evidence", "machine"}
    return record | {"latency": timed.model_dump(mode="json", include=measured) if timed else None}


def summary(evidence: Evidence, findings: Findings, page: Page) -> str:
    """The result for the terminal: the tables, the gain, the gates."""
    arms = findings.experiment
    tables = [arms_table(arms)] if arms else []
    tables += [] if arms and results.shipped(evidence) is None else [results.result_table(evidence)]
    lines = [line for table in tables for line in (*columns([table.head, *table.rows]), "")][:-1]
    if any(not timed.reliable for timed in evidence.latency_rows):
        lines.append(sentence(f"? marks times that the machine disturbed; {evidence.measure_again}"))
    lines += ["", *(sentence(one) for one in page.lead)]
    lines += ["", sentence(page.verdict)]
    marks = [
        ("passed" if gate.passed else "FAILED", gate.name, f"asked {gate.asked}", gate.measured) for gate in page.gates
    ]
    lines += [f"  {line}" for line in columns(marks)] if marks else []
    return "\n".join([*lines, ""])
