"""Store: finished artifacts on disk, found by the key of what made them.

    runs/<uses>-<key>/          an artifact: its files, run.log, provenance.json, files.json, artifact.json
    runs/.partial/<uses>-<key>/ one that is being made, or whose making was cut short
    runs/work/<uses>-<key>/     what another machine is to do for one that is being made
    runs/targets/NAME.json      which machine a target is, from its first results on
    runs/.locks/                one flock a key: the kernel frees what a dead process held
    runs/latest/NODE            a link to the artifact of each node of the last run

What can be seen is finished: files are fsynced, `artifact.json` is written last, then the directory is renamed.
"""

import ctypes
import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import digest

_OWN = ("artifact.json", "files.json", "provenance.json")
_NOT_CONTENT = ("provenance.json", "run.log")  # times and hosts: equal results may differ in these
_NAME = re.compile(r".+-[0-9a-f]{16}")
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@dataclass(frozen=True)
class Finished:
    """A finished artifact: where it lies, the digest of its content, the gates that failed."""

    directory: Path
    content: str
    failures: tuple[str, ...]

    @property
    def provenance(self) -> dict[str, Any]:
        """How it was made."""
        return dict(json.loads((self.directory / "provenance.json").read_text()))

    @property
    def files(self) -> dict[str, dict[str, Any]]:
        """The sha256 and the size in bytes of each file, by its path in the directory."""
        return dict(json.loads((self.directory / "files.json").read_text())["files"])


class Store:
    """The artifacts under one folder. It may be shared by any number of processes of one machine."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()

    def directory(self, uses: str, key: str) -> Path:
        """Return where the artifact of a key lies, or will."""
        return self.root / f"{uses}-{key[:16]}"

    def partial(self, uses: str, key: str) -> Path:
        """Return where it is being made."""
        return self.root / ".partial" / f"{uses}-{key[:16]}"

    def work(self, uses: str, key: str) -> Path:
        """Return the folder of what another machine is to do for it; it lasts until the artifact is published."""
        return self.root / "work" / f"{uses}-{key[:16]}"

    def target(self, name: str) -> Path:
        """Return the file that remembers which machine a target is."""
        return self.root / "targets" / f"{name}.json"

    def _forced(self, uses: str, key: str) -> Path:
        """Return the file whose presence says that the partial directory was begun to replace a finished artifact."""
        partial = self.partial(uses, key)
        return partial.with_name(f"{partial.name}.forced")

    def finished(self, uses: str, key: str) -> Finished | None:
        """Return a whole artifact, or None when there is none or `damage` finds any."""
        directory = self.directory(uses, key)
        return None if self.damage(directory) else _read(directory)

    def damage(self, directory: Path) -> str:
        """Return what a look at names and sizes finds wrong, or nothing; `verify` reads the contents too."""
        try:
            json.loads((directory / "artifact.json").read_text())
            json.loads((directory / "provenance.json").read_text())
            files = _files(directory)
        except FileNotFoundError as error:
            return f"{error.filename} is missing"
        except (ValueError, KeyError, TypeError):
            return f"{directory}: artifact.json, provenance.json or files.json is damaged"
        for name, file in files.items():
            path = directory / name
            if not path.is_file():
                return f"{path} is missing"
            if path.stat().st_size != file["bytes"]:
                return f"{path} has {path.stat().st_size} bytes, had {file['bytes']}"
        return ""

    def verify(self, directory: Path) -> list[str]:
        """Read every file again and return what differs from when it was published."""
        damage = self.damage(directory)
        if damage:
            return [damage]
        files = _files(directory)
        return [
            f"{directory / name}: its content has changed since it was published"
            for name, file in files.items()
            if digest.of_file(directory / name) != file["sha256"]
        ]

    def of_kind(self, uses: str) -> list[Finished]:
        """Return the whole artifacts of a stage file, the newest first."""
        found = [path for path in self.root.glob(f"{uses}-*") if _is_name(path, uses) and not self.damage(path)]
        return [_read(path) for path in sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True)]

    def directories(self) -> list[Path]:
        """Return the directories of all artifacts, of all that are partial and of work for other machines."""
        found = [path for path in self.root.glob("*") if _NAME.fullmatch(path.name)]
        found += [path for path in self.root.glob("work/*") if _NAME.fullmatch(path.name)]
        found += [path for path in self.root.glob(".partial/*") if _NAME.fullmatch(path.name.partition(".")[0])]
        return sorted(path for path in found if path.is_dir() and not path.is_symlink())

    @contextmanager
    def lock(self, name: str, waiting: Callable[[], None] | None) -> Iterator[bool]:
        """Hold the lock of `<uses>-<key>`; yields whether it is held.

        While another process holds it: calls `waiting` and waits, or, when `waiting` is None, yields False.
        """
        path = self.root / ".locks" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            with path.open("a") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    if waiting is None:
                        yield False
                        return
                    waiting()
                    fcntl.flock(file, fcntl.LOCK_EX)
                if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    continue  # the file was removed by `clean` while we waited for it
                yield True
                return

    def begin(self, uses: str, key: str, *, fresh: bool, inputs: object, forced: bool = False) -> Path:
        """Return the partial directory of a key, emptied if `fresh` or if it was begun with other inputs.

        If `forced` it is also emptied unless it was begun so: making again begins at the beginning, once. Work for
        another machine is kept, or not, by the same rule but for `fresh`. `inputs` are JSON values; hold the lock.
        """
        partial, mark = self.partial(uses, key), self._forced(uses, key)
        note = partial.with_name(f"{partial.name}.inputs.json")
        begun_with = note.read_bytes() if note.is_file() else b""
        given = json.dumps(inputs, sort_keys=True).encode()
        complete = _complete(partial)
        if complete.exists() and not partial.exists():  # killed in the midst of publishing
            complete.rename(partial)
        anew = begun_with != given or (forced and not mark.exists())
        if anew:
            shutil.rmtree(self.work(uses, key), ignore_errors=True)
        if fresh or anew:
            mark.unlink(missing_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True, exist_ok=True)
        if forced:
            mark.touch()
        # Of a run that was killed while it published, or within `write_atomically`: else it would be published now.
        for left in [*(partial / name for name in _OWN), *partial.rglob(".*.tmp")]:
            left.unlink(missing_ok=True)
        if begun_with != given:
            digest.write_atomically(note, given)
        return partial

    def publish(
        self,
        uses: str,
        key: str,
        record: bytes,
        provenance: dict[str, Any],
        incidental: Collection[str] = (),
        content: str = "",
        scratch: Collection[str] = (),
    ) -> Finished:
        """Make the partial directory of a key its artifact, replacing one that is there; hold the lock.

        `record` is what `artifact.json` will hold; its fields `incidental` are no part of the content's digest, which
        is `content` if given. The files `scratch` are deleted on the way, when the rest is whole.
        Raises ValueError when the directory holds links.
        """
        partial, directory = self.partial(uses, key), self.directory(uses, key)
        (partial / "provenance.json").write_text(json.dumps(provenance, indent=1) + "\n")
        files = {name: found for name, found in _hashed(partial).items() if name not in scratch}
        described = {"content": content or _content(files, record, incidental), "files": files}
        (partial / "files.json").write_text(json.dumps(described, indent=1) + "\n")
        for folder, _, names in os.walk(partial, topdown=False):
            for name in names:
                _fsync(Path(folder) / name)
            _fsync(Path(folder))
        (partial / "artifact.json").write_bytes(record)
        _fsync(partial / "artifact.json")
        _fsync(partial)
        complete = _complete(partial)
        shutil.rmtree(complete, ignore_errors=True)
        partial.rename(complete)
        for name in scratch:
            (complete / name).unlink(missing_ok=True)
        self._forced(uses, key).unlink(missing_ok=True)  # before what is replaced may be taken for what replaces it
        _rename_over(complete, directory)
        _fsync(self.root)
        partial.with_name(f"{partial.name}.inputs.json").unlink(missing_ok=True)
        shutil.rmtree(self.work(uses, key), ignore_errors=True)
        return _read(directory)

    def latest(self, node: str) -> Path:
        """Return the link to the artifact of a node."""
        return self.root / "latest" / node.replace("/", "_")

    def link_latest(self, node: str, directory: Path) -> None:
        """Make `latest/NODE` a link to an artifact, replacing another atomically."""
        link = self.latest(node)
        link.parent.mkdir(parents=True, exist_ok=True)
        target = os.path.relpath(directory, link.parent)
        if not (link.is_symlink() and os.readlink(link) == target):
            temporary = link.with_name(f".{link.name}.{os.getpid()}.tmp")
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(target)
            temporary.replace(link)


def _complete(partial: Path) -> Path:
    """Return the name of a whole partial directory; after an exchange the artifact that was replaced has it."""
    return partial.with_name(f"{partial.name}.new")


def _is_name(path: Path, uses: str) -> bool:
    return bool(_NAME.fullmatch(path.name)) and path.name[:-17] == uses


def _files(directory: Path) -> dict[str, Any]:
    return dict(json.loads((directory / "files.json").read_text())["files"])


def _read(directory: Path) -> Finished:
    record = json.loads((directory / "artifact.json").read_text())
    described = json.loads((directory / "files.json").read_text())
    return Finished(directory, described["content"], tuple(record.get("failures", ())))


def _hashed(directory: Path) -> dict[str, dict[str, Any]]:
    """Return the size and sha256 of every file below a directory."""
    files = {}
    for path in sorted(directory.rglob("*")):
        if path.is_symlink():
            raise ValueError(f"{path}: an artifact holds files, not links; copy what it points at")
        if path.is_file():
            name = path.relative_to(directory).as_posix()
            files[name] = {"bytes": path.stat().st_size, "sha256": digest.of_file(path)}
    return files


def _content(files: Mapping[str, dict[str, Any]], record: bytes, incidental: Collection[str]) -> str:
    """Return the digest of what was made: the files and the record, without what only tells of the making."""
    values = json.loads(record) if incidental else {}
    apart = {values[field] for field in incidental if isinstance(values.get(field), str)}
    hashes = [
        (name, file["sha256"])
        for name, file in files.items()
        if name not in _NOT_CONTENT and name not in apart and name.partition("/")[0] not in apart
    ]
    if not incidental:
        return digest.of_values([hashes, record.decode()])
    return digest.of_values([hashes, {k: value for k, value in values.items() if k not in incidental}])


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _rename_over(source: Path, target: Path) -> None:
    """Rename a directory; if the target exists, exchange the two in one step and remove the old one."""
    if not target.exists():
        source.rename(target)
        return
    exchange = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    flags = (_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), _RENAME_EXCHANGE)
    if (
        exchange is None or exchange(*flags) != 0
    ):  # another system, or a file system that cannot: a moment without either
        old = source.with_name(f"{target.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
        source.rename(target)
        source = old
    shutil.rmtree(source, ignore_errors=True)
