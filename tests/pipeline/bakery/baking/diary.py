"""A diary outside the store, so that tests can count what really ran."""

import os
from pathlib import Path


def note(line: str) -> None:
    """Append a line to the diary that the tests name."""
    with Path(os.environ["BAKERY_DIARY"]).open("a") as diary:
        diary.write(line + "\n")
