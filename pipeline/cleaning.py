"""Cleaning: what in a store no plan reaches, and removing it safely."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from pipeline.plan import Plan
from pipeline.store import Store


def unreached(store: Store, plans: Sequence[Plan]) -> list[tuple[Path, int]]:
    """Return the directories, finished and partial, that no plan reaches, with their size in bytes."""
    reached = {store.directory(step.uses, step.key).name for plan in plans for step in plan.steps}
    return [(path, _bytes(path)) for path in store.directories() if path.name not in reached]


def remove(store: Store, directory: Path) -> bool:
    """Delete a directory of the store unless somebody holds its lock; return whether it was deleted."""
    name = directory.name.partition(".")[0]
    with store.lock(name, None) as held:
        if not held:
            return False
        if directory.parent == store.root:
            # Out of sight in one step: half an artifact must never be found under a finished one's name.
            hidden = store.root / ".partial" / f"{name}.new"
            hidden.parent.mkdir(exist_ok=True)
            shutil.rmtree(hidden, ignore_errors=True)
            directory.rename(hidden)
            directory = hidden
        shutil.rmtree(directory)
        for note in ("inputs.json", "forced"):
            (store.root / ".partial" / f"{name}.{note}").unlink(missing_ok=True)
        (store.root / ".locks" / name).unlink(missing_ok=True)
    for link in (store.root / "latest").glob("*"):
        if link.is_symlink() and not link.exists():
            link.unlink()
    return True


def _bytes(directory: Path) -> int:
    return sum((Path(folder) / name).lstat().st_size for folder, _, names in os.walk(directory) for name in names)
