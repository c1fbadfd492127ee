"""Which of a foreign model's classes are the dataset's: by name, never by number."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.errors import UserError, did_you_mean
from stages.detection.torchvision_weights import COCO_NAMES

COCO80 = tuple(name for name in COCO_NAMES if name not in ("__background__", "N/A"))


@dataclass(frozen=True)
class ClassMatch:
    """`selected` are places among the model's classes, `labels` the dataset's labels of them; the dataset's `unknown` ones
    are none of the model's."""

    selected: tuple[int, ...]
    labels: tuple[int, ...]
    unknown: tuple[str, ...]


def matched(theirs: Sequence[str], ours: Sequence[str], rename: Mapping[str, str], ignore_unknown: bool) -> ClassMatch:
    """Find the dataset's classes among the model's; `rename` gives the model's name of one of the dataset's.

    Raises UserError where some are unknown and that was not allowed, or all are, and where two would be one of the model's.
    """
    if strangers := sorted(set(rename) - set(ours)):
        raise UserError(f"external: rename speaks of {', '.join(strangers)}{did_you_mean(strangers[0], ours)}")
    place = {own: rename.get(own, own) for own in ours}
    unknown = tuple(own for own, name in place.items() if name not in theirs)
    if len(unknown) == len(place) or (unknown and not ignore_unknown):
        raise UserError(
            f"external: the model knows no {', '.join(unknown)}; say what it calls them (rename: {{{unknown[0]}: ...}}), or "
            f"set unknown: ignore{did_you_mean(place[unknown[0]], theirs)}"
        )
    twice = [name for name, count in Counter(place.values()).items() if count > 1 and name in theirs]
    if twice:
        own = ", ".join(own for own, name in place.items() if name == twice[0])
        raise UserError(
            f"external: {own} would all be the model's {twice[0]}; make them one class (`classes` of the dataset)"
        )
    known = [(theirs.index(name), label) for label, name in enumerate(place.values()) if name in theirs]
    return ClassMatch(tuple(index for index, _ in known), tuple(label for _, label in known), unknown)
