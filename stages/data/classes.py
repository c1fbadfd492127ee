"""Which classes detectors learn, of those that are annotated: some of them, in an order of one's own, several as one.

classes: [car, person]                        these two, car first; boxes of others are left out
classes: [person, {vehicle: [car, truck]}]    cars and trucks are vehicles
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from pipeline.errors import UserError, did_you_mean
from stages.data.coco_document import CocoCategory, CocoDocument


def _listed(value: Any) -> Any:
    """`{a: [b], c: [d]}` is `[{a: [b]}, {c: [d]}]`."""
    return [{new: old} for new, old in value.items()] if isinstance(value, dict) else value


def _used_once(value: tuple[str | dict[str, tuple[str, ...]], ...]) -> tuple[str | dict[str, tuple[str, ...]], ...]:
    if wrong := [item for item in value if isinstance(item, dict) and (len(item) != 1 or not all(item.values()))]:
        raise ValueError(
            f"{wrong[0]} is not one new name with the classes it is made of; write {{vehicle: [car, truck]}}"
        )
    pairs = parts(value)
    for what, names in (
        ("new class", [new for new, _ in pairs]),
        ("class", [old for _, olds in pairs for old in olds]),
    ):
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise ValueError(f"{what} {twice[0]!r} stands there twice; name each once")
    return value


# A list, not a mapping: labels are in its order, and settings that differ in the order of keys alone count as equal.
Classes = Annotated[
    tuple[str | dict[str, tuple[str, ...]], ...],
    Field(min_length=1),
    BeforeValidator(_listed),
    AfterValidator(_used_once),
]


def parts(classes: Sequence[str | dict[str, tuple[str, ...]]]) -> list[tuple[str, tuple[str, ...]]]:
    """(new name, names in the data) of each class."""
    return [(item, (item,)) if isinstance(item, str) else next(iter(item.items())) for item in classes]


def selected(
    categories: Sequence[CocoCategory], classes: Sequence[str | dict[str, tuple[str, ...]]]
) -> tuple[list[CocoCategory], dict[int, int]]:
    """The new categories, with ids from 1 in their order, and the new id of each old one that is kept.

    Raises UserError naming every class that the data does not have.
    """
    ids = {category["name"]: category["id"] for category in categories}
    pairs = parts(classes)
    problems = [
        f"classes: the data has no {old!r}{did_you_mean(old, ids)}"
        for _, olds in pairs
        for old in olds
        if old not in ids
    ]
    if problems:
        raise UserError("\n".join(problems))
    made: list[CocoCategory] = [{"id": number, "name": new} for number, (new, _) in enumerate(pairs, 1)]
    return made, {ids[old]: number for number, (_, olds) in enumerate(pairs, 1) for old in olds}


def keep(document: CocoDocument, ids: dict[int, int]) -> Counter[str]:
    """Leave out what is of no selected class, and give the rest its new category id. Every image stays.

    Returns how many annotations of each class were left out.
    """
    names = {category["id"]: category["name"] for category in document["categories"]}
    dropped = Counter(names[a["category_id"]] for a in document["annotations"] if a["category_id"] not in ids)
    document["annotations"] = [a for a in document["annotations"] if a["category_id"] in ids]
    for annotation in document["annotations"]:
        annotation["category_id"] = ids[annotation["category_id"]]
    return dropped
