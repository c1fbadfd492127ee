"""Digests: sha256 of values, files and folders; those of outside files are remembered by path, size and time."""

import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

_SETTLED_NS = 2_000_000_000


def of_values(values: object) -> str:
    """Return the sha256 of JSON values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def of_file(path: Path) -> str:
    """Return the sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def of_folder(path: Path) -> str:
    """Return the sha256 of the names, sizes and times of all files below a folder; their contents are not read.

    Links are followed, each folder once; of a link to nothing the link itself counts.
    """
    manifest, folders, entered = [], [path], set()
    while folders:
        folder = folders.pop()
        place = os.path.realpath(folder)
        if place in entered:
            continue
        entered.add(place)
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.is_dir():
                    folders.append(Path(entry.path))
                else:
                    stat = entry.stat(follow_symlinks=os.path.exists(entry.path))
                    manifest.append((os.path.relpath(entry.path, path), stat.st_size, stat.st_mtime_ns))
    return of_values(sorted(manifest))


class Digests:
    """Digests of files outside the store, remembered in one file of the store by (path, size, mtime)."""

    def __init__(self, memory: Path) -> None:
        self._memory = memory
        self._known: dict[str, list[Any]] = {}
        self._changed = False
        with suppress(FileNotFoundError, ValueError):  # a memory only: without it everything is read again
            self._known = json.loads(memory.read_text())

    def file(self, path: Path) -> str:
        """Return the sha256 of a file, from memory if it has not changed since. Raises OSError when it is gone."""
        stat = path.stat()
        known = self._known.get(str(path))
        if known and known[:2] == [stat.st_size, stat.st_mtime_ns]:
            return str(known[2])
        digest = of_file(path)
        # A file written a moment ago may be written again within the clock's grain: do not remember it yet.
        if time.time_ns() - stat.st_mtime_ns > _SETTLED_NS:
            self._known[str(path)] = [stat.st_size, stat.st_mtime_ns, digest]
            self._changed = True
        return digest

    def save(self) -> None:
        """Write the memory, if there is anything to remember."""
        if self._changed:
            write_atomically(self._memory, json.dumps(self._known).encode())


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it is seen whole or not at all, and lasts: temporary file, fsync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
