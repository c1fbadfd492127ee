"""Which licence a bundle is under: the user's word, and what detectors of the chain brought."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

UNKNOWN = "unknown"


@dataclass(frozen=True)
class Licence:
    """`name` for the card's head, as the hub writes it; `sentences` for its text, none where nothing was brought."""

    name: str
    sentences: tuple[str, ...] = ()


def settled(asked: str, reason: str, brought: Collection[str]) -> Licence:
    """The licence of a bundle: what was asked for, or what a detector brought if nothing was.

    Raises ValueError where the two contradict, and no `reason` is given why it may be; and where several are brought and
    none is asked for.
    """
    if not brought:
        return Licence(asked)
    names = " and ".join(sorted(brought))
    origin = f"A detector that these weights were trained as, or taught by, comes under {names}."
    if asked == UNKNOWN:
        if len(brought) > 1:
            raise ValueError(f"licence: detectors brought {names}; say which holds, with licence and licence_reason")
        return Licence(names.lower(), (f"{origin} So does this bundle, where nobody says why not.",))
    if {asked.lower()} == {one.lower() for one in brought}:
        return Licence(asked, (origin,))
    if not reason:
        raise ValueError(
            f"licence: {asked} is asked for, and a detector of the chain comes under {names}; leave licence out, or say in "
            "licence_reason why another may hold, as the number of a commercial licence"
        )
    return Licence(asked, (origin, f"{asked} holds instead, says who made the bundle: {reason}"))
