"""Atomic: a file or a folder that is seen whole or not at all, and lasts once it is seen."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from deploy.errors import DeployError


def write(file: Path, content: bytes) -> None:
    """Writes a file, in place of one that is there. Raises DeployError where it cannot, and leaves what was there."""
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as opened:
            opened.write(content)
            opened.flush()
            os.fsync(opened.fileno())
        partial.replace(file)
    except OSError as error:
        with suppress(OSError):  # where a file stands in the folder's place, this fails too
            partial.unlink()
        raise DeployError(f"{file}: it cannot be written ({error}); choose another place") from error


@contextmanager
def new_folder(directory: Path) -> Iterator[Path]:
    """A folder to fill, which is `directory` from the end of the block on; after an error there is nothing.

    Raises DeployError where there is one already.
    """
    if directory.exists():
        raise DeployError(f"{directory}: the folder exists; choose another or remove it")
    partial = directory.with_name(f".{directory.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        publish(partial, directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def publish(partial: Path, directory: Path) -> None:
    """Gives a filled folder its name, in place of the folder that has it, after all that is in it is on disk."""
    for path in [*partial.rglob("*"), partial]:
        sync(path)
    shutil.rmtree(directory, ignore_errors=True)
    partial.rename(directory)
    sync(directory.parent)


def sync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
