"""Wiring: which stage of a config feeds which slot of which other, by `needs`, by name, or by type.

A slot named in `needs` takes what is named there. Otherwise a list slot gathers every stage whose result fits, in the
config's order, except those downstream of its own stage, and any other (an optional list too) takes the stage of its own
name.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from typing import Any

from pipeline.config import BaseConfig
from pipeline.errors import closest, did_you_mean
from pipeline.matrix import Axes, Reference
from pipeline.stage import Slot, Stage


@dataclass
class Entry:
    """One stage of a config: what it uses, its settings for every combination of its matrix, and its edges."""

    name: str
    stage: Stage | None  # None: no such file; what refers to it is not a second problem
    needs: object = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    configs: list[tuple[Axes, BaseConfig | None]] = field(default_factory=list)
    edges: dict[str, list[Reference]] = field(default_factory=dict)
    target: str = ""

    @property
    def feeding(self) -> set[str]:
        """The names of the stages that feed it."""
        return {reference.stage for references in self.edges.values() for reference in references}

    @property
    def whole(self) -> bool:
        """Whether its settings are valid and every slot that needs one has its stage."""
        slots = self.stage.slots.values() if self.stage else ()
        filled = all(slot.many or slot.optional or self.edges.get(slot.name) for slot in slots)
        return filled and all(config is not None for _, config in self.configs)


def wire(entries: Mapping[str, Entry]) -> list[str]:
    """Fill the edges of every entry; return the problems."""
    problems: list[str] = []
    gathering: list[tuple[Entry, Slot]] = []
    for entry in entries.values():
        if entry.stage is None:
            continue
        needs = _needs(entry, problems)
        meant = {closest(str(name), entry.stage.slots) for name in needs if name not in entry.stage.slots}
        for slot in entry.stage.slots.values():
            if slot.name in needs:
                entry.edges[slot.name] = _named(entry, slot, needs[slot.name], entries, problems)
            elif slot.gathers:
                gathering.append((entry, slot))
            else:
                # That a slot is empty, whose name was written wrong, is not a second problem.
                found = [] if slot.name in meant else problems
                entry.edges[slot.name] = _same_name(entry, slot, entries, found)
    # The last first: of two stages that could gather each other, the later one in the config gathers the earlier.
    for entry, slot in reversed(gathering):
        below = _downstream(entry.name, entries)
        others = (other for other in entries.values() if other.name not in below and _fits(slot, other))
        entry.edges[slot.name] = [Reference(other.name, {}) for other in others]
    return problems


def order(entries: Mapping[str, Entry]) -> tuple[list[Entry], list[str]]:
    """Return the entries so that each comes after what feeds it, else in the config's order; and the cycle, if any."""
    before = {name: entry.feeding for name, entry in entries.items()}
    try:
        TopologicalSorter(before).prepare()
    except CycleError as error:
        cycle = " -> ".join(error.args[1])
        return [], [f"stages.{error.args[1][0]}.needs: stages feed each other in a circle: {cycle}; remove one"]
    ordered: list[Entry] = []
    left = dict(entries)
    while left:
        ready = next(name for name in left if not before[name] & left.keys())
        ordered.append(left.pop(ready))
    return ordered, []


def _needs(entry: Entry, problems: list[str]) -> Mapping[str, Any]:
    """Return the well-formed part of an entry's `needs`."""
    assert entry.stage is not None
    where = f"stages.{entry.name}.needs"
    if entry.needs is None:
        return {}
    if not isinstance(entry.needs, dict):
        problems.append(f"{where}: give {{slot: stage}}; slots: {', '.join(entry.stage.slots) or 'none'}")
        return {}
    for slot in entry.needs:
        if slot not in entry.stage.slots:
            mend = did_you_mean(str(slot), entry.stage.slots)
            problems.append(f"{where}.{slot}: {entry.stage.name} has no such slot{mend}")
    return entry.needs


def _named(
    entry: Entry, slot: Slot, given: object, entries: Mapping[str, Entry], problems: list[str]
) -> list[Reference]:
    """Return what `needs` names for a slot, as far as it exists and fits; null leaves an optional slot empty."""
    where = f"stages.{entry.name}.needs.{slot.name}"
    if given is None and slot.optional:
        return []
    names = given if isinstance(given, list) else [given]
    if not slot.many and (isinstance(given, list) or given is None):
        problems.append(f"{where}: takes one {slot}{_would_fit(entry, slot, entries)}")
        return []
    found = []
    for name in names:
        try:
            reference = Reference.parse(name)
        except ValueError as error:
            problems.append(f"{where}: {error}")
            continue
        problem = _unfit(slot, reference, entries)
        if problem:
            problems.append(f"{where}: {problem}{_would_fit(entry, slot, entries) if 'makes' in problem else ''}")
        elif reference not in found:
            found.append(reference)
    return found


def _unfit(slot: Slot, reference: Reference, entries: Mapping[str, Entry]) -> str:
    """Return why a reference cannot feed a slot, or nothing."""
    other = entries.get(reference.stage)
    if other is None:
        return f"no stage '{reference.stage}'{did_you_mean(reference.stage, entries)}"
    if other.stage is not None and not slot.fits(other.stage.produces):
        return f"takes a {slot}, but '{other.name}' makes a {other.stage.produces.__name__}"
    return ""


def _same_name(entry: Entry, slot: Slot, entries: Mapping[str, Entry], problems: list[str]) -> list[Reference]:
    """Return the stage that has a slot's own name; none is a problem unless the slot is optional."""
    where = f"stages.{entry.name}.needs.{slot.name}"
    reference = Reference(slot.name, {})
    if slot.name != entry.name and slot.name in entries:
        problem = _unfit(slot, reference, entries)
        if not problem:
            return [reference]
        problems.append(f"{where}: {problem}{_would_fit(entry, slot, entries)}")
    elif not slot.optional:
        would = _would_fit(entry, slot, entries)
        problems.append(f"{where}: needs a {slot} and no other stage is named '{slot.name}'{would}")
    return []


def _would_fit(entry: Entry, slot: Slot, entries: Mapping[str, Entry]) -> str:
    below = _downstream(entry.name, entries)
    fitting = [other.name for other in entries.values() if other.name not in below and _fits(slot, other)]
    return f"; would fit: {', '.join(fitting)}" if fitting else "; no stage here makes one"


def _fits(slot: Slot, other: Entry) -> bool:
    return other.stage is not None and slot.fits(other.stage.produces)


def _downstream(name: str, entries: Mapping[str, Entry]) -> set[str]:
    """Return the stages that take from this one, directly or not, and itself, by the edges known so far."""
    found = {name}
    grown = True
    while grown:
        more = {entry.name for entry in entries.values() if entry.feeding & found}
        grown = not more <= found
        found |= more
    return found
