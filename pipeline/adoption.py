"""Adoption: which older artifact differs from a step by its code alone, and if none does, by what else.

A setting that only today's code knows counts as equal while it stands at its default, and so does a slot that only
today's code knows while it is empty.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from pipeline.plan import Step
from pipeline.store import Finished, Store

MadeFrom = Mapping[str, list[dict[str, str]]]  # slot -> node, key and content of each input

_SHOWN = 60  # characters of a value


def adoptable(step: Step, made_from: MadeFrom | None, store: Store) -> Finished | None:
    """Return the newest artifact that differs from a step's by its code alone.

    Its inputs must have had the same content, so that one that was itself adopted does not stand in the way. Without
    `made_from`, while the inputs are not made yet, they are not compared.
    """
    return next((found for found in store.of_kind(step.uses) if not any(_differences(step, made_from, found))), None)


def refusal(step: Step, made_from: MadeFrom | None, store: Store) -> str:
    """Return why no artifact is adoptable: what differs in the newest of the same node, else of the same stage file."""
    found = store.of_kind(step.uses)
    newest = next((one for one in found if one.provenance.get("node") == step.name), next(iter(found), None))
    where = f"{step.name}: --keep-older-code"
    if newest is None:
        return f"{where}: there is no older result of {step.uses} in {store.root}; leave the option out to make it"
    differing = "; ".join(_differences(step, made_from, newest))
    return (
        f"{where}: more than the code of {newest.directory.name} differs: {differing}; leave the option out to make it"
    )


def _differences(step: Step, made_from: MadeFrom | None, older: Finished) -> Iterator[str]:
    """Yield what of settings, machine and inputs is not as it was when an artifact was made."""
    provenance = older.provenance
    parts = provenance["parts"]
    yield from _unequal(parts["settings"], step.parts["settings"], "", frozenset(step.defaults))
    yield from _unequal(parts["identity"], step.parts["identity"], "identity", frozenset())
    if made_from is not None:
        before = _fed(parts, provenance["inputs"])
        now = _fed(step.parts, made_from)
        for slot in {**before, **now}:
            was, is_ = before.get(slot, []), now.get(slot, [])
            if [fed[1:] for fed in was] != [fed[1:] for fed in is_]:
                yield f"input {slot}: was {_inputs(was)}, is {_inputs(is_)}"


def _unequal(old: Any, new: Any, where: str, defaults: Collection[str]) -> Iterator[str]:
    """Yield the places where two trees of JSON values differ; `defaults` are those where a new value counts not."""
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        old, new = ({str(i): item for i, item in enumerate(items)} for items in (old, new))
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in {**old, **new}:
            place = f"{where}.{name}" if where else name
            if name not in new:
                yield f"{place}: was {_value(old[name])}, is not there now"
            elif name in old:
                yield from _unequal(old[name], new[name], place, defaults)
            elif place not in defaults:
                yield f"{place}: was not there, is {_value(new[name])}"
    elif old != new:
        yield f"{where}: was {_value(old)}, is {_value(new)}"


def _value(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _fed(parts: Mapping[str, Any], made_from: MadeFrom) -> dict[str, list[tuple[str, str, str]]]:
    """Return, by slot, each input's node, its label in the result and its content.

    Results are labelled by node names in list slots: there these count.
    """
    return {
        slot: [
            (fed["node"], fed["node"] if isinstance(parts["inputs"][slot], list) else "", fed["content"]) for fed in one
        ]
        for slot, one in made_from.items()
    }


def _inputs(fed: list[tuple[str, str, str]]) -> str:
    return ", ".join(f"{node} with content {content[:8]}" for node, _, content in fed) or "empty"
