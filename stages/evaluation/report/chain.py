"""The chain from teacher to shipped file: AP at each model, and which hop between them lost some.

teacher -> student before pruning -> pruned -> exported. The first hop is a gap: two detectors, trained differently. All
hops after the training are conversions of one detector, where every tenth that is missing was lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from pydantic import BaseModel, ConfigDict

from stages.artifacts.reports import AccuracyRow
from stages.evaluation.report.evidence import Evidence
from stages.evaluation.report.wording import ap, listed

Chain = list[AccuracyRow]
VISIBLE = 0.0005  # a difference of AP below it prints as 0.0


class Hop(BaseModel):
    """From one measured model to the next that was made from it."""

    model_config = ConfigDict(frozen=True)

    source: str
    target: str
    kind: Literal["gap", "loss"]
    """A gap lies between teacher and student; a loss between two forms of one detector."""
    source_ap: float | None
    target_ap: float | None
    lost: float | None
    """AP of the source minus AP of the target; negative where the target is better."""


def chains(evidence: Evidence) -> list[Chain]:
    """One chain for each model that nothing measured was made from, first ancestor first; single models are none.

    Chains that end in a file that ships come first.
    """
    ancestors = {key for row in evidence.rows for key in list(evidence.lineage(row.key))[1:]}
    ends = [row for row in evidence.rows if row.key not in ancestors]
    found = [_chain(row, evidence) for row in ends]
    return sorted((chain for chain in found if len(chain) > 1), key=lambda chain: chain[-1].kind != "exported")


def _chain(end: AccuracyRow, evidence: Evidence) -> Chain:
    keys = list(evidence.lineage(end.key))[1:]
    measured = [row for key in keys if (row := evidence.row(key)) is not None]
    return [*reversed(measured), end]


def hops(chain: Chain, evidence: Evidence) -> list[Hop]:
    """The hops of one chain; steps whose AP was not measured are passed over."""
    return [_hop(a, b, evidence) for a, b in pairwise(chain)]


def _hop(a: AccuracyRow, b: AccuracyRow, evidence: Evidence) -> Hop:
    keys = list(evidence.lineage(b.key))
    taught = any(evidence.learnt(key) for key in keys[: keys.index(a.key)])
    before, after = a.statistics.get("ap"), b.statistics.get("ap")
    lost = None if before is None or after is None else before - after
    kind: Literal["gap", "loss"] = "gap" if taught else "loss"
    return Hop(source=a.label, target=b.label, kind=kind, source_ap=before, target_ap=after, lost=lost)


def distinct(found: Sequence[Hop]) -> list[Hop]:
    """Chains share hops: each once."""
    return list(dict.fromkeys(found))


def explained(found: Sequence[Hop]) -> list[str]:
    """In words: the gaps, and which hop after the training lost most."""
    words = [
        f"from {hop.source} ({ap(hop.source_ap)}) to {hop.target} ({ap(hop.target_ap)}) is a gap of {ap(hop.lost)} AP, "
        "not a loss: another detector, trained in another way"
        for hop in found
        if hop.kind == "gap"
    ]
    conversions = [hop for hop in found if hop.kind == "loss"]
    measured = [(hop.lost, hop) for hop in conversions if hop.lost is not None]
    if not measured:
        return [*words, "no hop after the training was measured on both of its sides"]
    lossy = sorted((pair for pair in measured if pair[0] >= VISIBLE), key=lambda pair: -pair[0])
    if not lossy:
        steps = listed([f"{hop.source} to {hop.target}" for _, hop in measured])
        return [*words, f"no AP was lost after the training ({steps})"]
    most, worst = lossy[0]
    words.append(f"after the training the hop from {worst.source} to {worst.target} lost the most: {ap(most)} AP")
    if others := [f"{hop.source} to {hop.target} {ap(lost)}" for lost, hop in lossy[1:]]:
        words.append(f"less was lost from {listed(others)}")
    return words
