"""What a distillation was made of: how good its teachers were, and what each loss gave of the gradient at the start."""

from __future__ import annotations

from stages.artifacts.checkpoint import DistilledCheckpoint
from stages.evaluation.report.evidence import Evidence
from stages.evaluation.report.page import Section, Table
from stages.evaluation.report.wording import ap, counted

TITLE = "Who taught, and by which loss"


def teaching(evidence: Evidence) -> Section | None:
    """The section; None where nothing was distilled, or nothing of it was measured."""
    made = [one for one in evidence.checkpoints if isinstance(one, DistilledCheckpoint)]
    taught = [
        (one.name, teacher.name, ap(teacher.ap), counted(teacher.images, "validation image"))
        for one in made
        for teacher in one.teachers
        if teacher.images
    ]
    shares = [
        (one.name, share.loss, percent(share.neck), percent(share.backbone)) for one in made for share in one.gradients
    ]
    tables = []
    if taught:
        tables.append(Table(("student", "teacher", "AP before it taught", "on a sample of"), taught, words=2))
    if shares:
        head = ("student", "loss", "share at the neck", "share at the backbone")
        tables.append(Table(head, shares, words=2, title="Shares of the gradient in the first steps"))
    if not tables:
        return None
    warnings = [f"{one.name}: {warning}" for one in made for warning in one.gradient_warnings]
    notes = [
        "a share is a loss's norm of the gradient over the sum of all losses' norms, in a few of the first 50 steps"
    ]
    return Section(TITLE, sentences=warnings, tables=tables, notes=notes if shares else [])


def percent(share: float) -> str:
    """`12.3 %`."""
    return f"{100 * share:.1f} %"
