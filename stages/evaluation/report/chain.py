"""The chain from teacher to shipped file: AP at each model, and which hop between them lost some.

teacher -> student before pruning -> pruned -> exported. The first hop is a gap: two detectors, trained differently. All
hops after the training are conversions of one detector, where every tenth that is missing was lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from stages.artifacts.reports import AccuracyRow
from stages.evaluation.report.evidence import Evidence
from stages.evaluation.report.wording import ap, interval, listed

Chain = list[AccuracyRow]
VISIBLE = 0.0005  # a difference of AP below it prints as 0.0
SIZES = ("small", "medium", "large")
NAMED = 3  # layers that a sentence names


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
    precision: str | None = None
    """Of the target, where this hop is what lowered it: fp16 or int8. The following is known of such hops."""
    lost_low: float | None = None
    """95 % interval of what was lost, by a paired bootstrap over the validation images."""
    lost_high: float | None = None
    lost_by_size: tuple[tuple[str, float], ...] = ()
    """The same loss of small, medium and large objects, where there are any."""
    sensitive: tuple[str, ...] = ()
    """Layers that bear the lower precision worst, the worst first."""
    float_layers: tuple[str, ...] = ()
    """Layers that were kept in float32."""


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
    lowered = {} if kind == "gap" or lost is None else _lowered(a, b, evidence)
    return Hop(source=a.label, target=b.label, kind=kind, source_ap=before, target_ap=after, lost=lost, **lowered)


def _lowered(a: AccuracyRow, b: AccuracyRow, evidence: Evidence) -> dict[str, Any]:
    """What is known of a hop to a lower precision; nothing of another hop."""
    model, source = evidence.model(b.key), evidence.model(a.key)
    if model is None or model.precision == (source.precision if source else "fp32"):
        return {}
    gain = evidence.gain(a, b)
    sizes = ((size, a.statistics.get(f"ap_{size}"), b.statistics.get(f"ap_{size}")) for size in SIZES)
    quantisation = model.quantisation
    return {
        "precision": model.precision,
        "lost_low": -gain.high,
        "lost_high": -gain.low,
        "lost_by_size": tuple((size, x - y) for size, x, y in sizes if x is not None and y is not None),
        "sensitive": tuple(one.layer for one in quantisation.layers[:NAMED]) if quantisation else (),
        "float_layers": model.float_layers,
    }


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


def narrowed(found: Sequence[Hop]) -> list[str]:
    """In words, of each hop to a lower precision: what it lost, of objects of which size, and by which layers."""
    return [_narrowed(hop, hop.lost) for hop in found if hop.precision and hop.lost is not None]


def _narrowed(hop: Hop, lost: float) -> str:
    said = f"lost {ap(lost)} AP" if lost >= VISIBLE else "lost no AP"
    words = [f"the {str(hop.precision).upper()} hop ({hop.source} to {hop.target}) {said}"]
    if hop.lost_low is not None and hop.lost_high is not None:
        words[0] += f", 95 % interval {interval(hop.lost_low, hop.lost_high)}"
    by_size = sorted(hop.lost_by_size, key=lambda pair: -pair[1])
    if lost >= VISIBLE and by_size and by_size[0][1] >= VISIBLE:
        (size, most), *others = by_size
        less = "".join(f", {other} {ap(value)}" for other, value in others)
        words[0] += f", mostly {size} objects ({ap(most)} AP of them{less})"
    if hop.sensitive:
        words.append(f"most sensitive layers: {', '.join(hop.sensitive)}")
    if hop.float_layers:
        shown = ", ".join(hop.float_layers[:NAMED])
        more = len(hop.float_layers) - NAMED
        words.append(f"kept in float32: {shown}" + (f" and {more} more" if more > 0 else ""))
    return "; ".join(words)
