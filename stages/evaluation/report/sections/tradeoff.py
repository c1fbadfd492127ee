"""Which file for which time? AP over latency of the exported files, and those that no other beats in both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stages.artifacts.checkpoint import DistilledCheckpoint
from stages.evaluation.report import plots
from stages.evaluation.report.evidence import Evidence
from stages.evaluation.report.page import Plot, Section, Table
from stages.evaluation.report.wording import ap, counted, milliseconds

LEAST = 3  # of two files the table says it all


@dataclass(frozen=True)
class Candidate:
    """An exported file on a machine."""

    name: str
    milliseconds: float
    """p50 of one image, file to detections."""
    ap: float
    made_by: str
    """The stage that trained it, `distill` or `train`; `elsewhere` for a file that came from outside."""
    network: str
    """Equal for files of the same network, which differ in their training alone."""
    reliable: bool
    gflops: float | None
    """10^9 operations of one image; None where nobody counted."""
    parameters: int

    @property
    def distilled(self) -> bool:
        """Whether it had help that the same network without it had not."""
        return self.made_by == "distill"


def candidates(evidence: Evidence) -> dict[str, list[Candidate]]:
    """Exported files with AP and latency by the machine they were measured on, the fastest first."""
    found: dict[str, list[Candidate]] = {}
    for row in evidence.exported:
        timed, value = evidence.latency_of(row, batch=1), row.statistics.get("ap")
        p50 = timed.steps.get("end_to_end", {}).get("p50") if timed else None
        if timed is None or value is None or p50 is None:
            continue
        training, model = evidence.training(row.key), evidence.model(row.key)
        network = repr((training.detector, model.precision if model else "")) if training else row.key
        distilled = isinstance(training, DistilledCheckpoint)
        made_by = ("distill" if distilled else "train") if training else "elsewhere"
        gflops = model.flops / 1e9 if model and model.flops else None
        one = Candidate(row.name, p50, value, made_by, network, timed.reliable, gflops, row.parameters)
        found.setdefault(row.target or "here", []).append(one)
    return {machine: sorted(ones, key=lambda one: one.milliseconds) for machine, ones in found.items()}


def unbeaten(found: Sequence[Candidate]) -> list[Candidate]:
    """Those than which none is both as fast and better, the fastest first."""
    best: list[Candidate] = []
    for one in sorted(found, key=lambda one: (one.milliseconds, -one.ap)):
        if not best or one.ap > best[-1].ap:
            best.append(one)
    return best


def tradeoff(evidence: Evidence) -> Section | None:
    """The section; None where no machine has enough files."""
    machines = {machine: ones for machine, ones in candidates(evidence).items() if len(ones) >= LEAST}
    if not machines:
        return None
    several = len(machines) > 1
    sentences, tables, shown = [], [], []
    for machine, ones in machines.items():
        best = unbeaten(ones)
        told = "; ".join(f"{one.name} ({milliseconds(one.milliseconds)} ms, {ap(one.ap)} AP)" for one in best)
        where = f" on {machine}" if several else ""
        sentences.append(f"of {counted(len(ones), 'exported file')}{where}, none is both faster and better than {told}")
        tables.append(table(ones, best, where.removeprefix(" on ")))
        caption = (
            f"AP over latency{where}: an image, p50, file to detections; filled: distilled, hollow: not; dotted: the same "
            "network; line: those that none beats"
        )
        shown.append(Plot(plots.frontier(ones, best), caption))
    doubtful = [one.name for ones in machines.values() for one in ones if not one.reliable]
    notes = [f"times that the machine disturbed: {', '.join(doubtful)}"] if doubtful else []
    return Section("Accuracy against latency", sentences=sentences, tables=tables, plots=shown, notes=notes)


def table(ones: Sequence[Candidate], best: Sequence[Candidate], title: str) -> Table:
    """A line a file, the fastest first."""
    lines = [
        (
            one.name,
            one.made_by,
            "yes" if one in best else "no",
            ap(one.ap),
            milliseconds(one.milliseconds) + ("" if one.reliable else " ?"),
            f"{one.gflops:.3f}" if one.gflops else "-",
            f"{one.parameters:,}",
        )
        for one in ones
    ]
    return Table(
        ("file", "trained by", "unbeaten", "AP", "p50 ms", "GFLOPs", "parameters"), lines, words=3, title=title
    )
