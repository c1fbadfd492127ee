"""Numbers as the report prints them: AP times 100 with one decimal, in JSON 0 to 1 with three decimals."""

from __future__ import annotations

from collections.abc import Sequence

MISSING = "-"


def ap(value: float | None, digits: int = 1) -> str:
    """AP, or a difference of two, in points."""
    if value is None:
        return MISSING
    text = f"{100 * value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text  # no "-0.0"


def signed_ap(value: float | None) -> str:
    """A difference with its sign."""
    text = ap(value)
    return text if text.startswith("-") or text == "0.0" else f"+{text}"


def interval(low: float, high: float) -> str:
    """Both ends, in points."""
    return f"[{ap(low)}, {ap(high)}]"


def rounded(value: float | None, digits: int = 3) -> float | None:
    """For JSON."""
    return None if value is None else round(value, digits)


def millions(count: float) -> str:
    """Parameters or operations: `0.52 M`, `31.2 G`."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f}"


def megabytes(count: float) -> str:
    """A size in MB of a million bytes."""
    return f"{count / 1e6:.2f}"


def milliseconds(value: float | None) -> str:
    """A time of a step."""
    return MISSING if value is None else f"{value:.2f}"


def seconds(value: float, beside: float = 0) -> str:
    """A time of training: `95 s`, `12.5 min`, `3.1 h`; in the unit of a longer one that it is compared with."""
    longest = max(value, beside)
    if longest < 300:
        return f"{value:.0f} s"
    return f"{value / 60:.1f} min" if longest < 7200 else f"{value / 3600:.1f} h"


def counted(count: int, noun: str) -> str:
    """`1 seed`, `3 seeds`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def listed(words: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def sentence(text: str) -> str:
    """With a capital in front and a full stop at the end."""
    text = " ".join(text.split())
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")
