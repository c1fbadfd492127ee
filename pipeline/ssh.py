"""Ssh: a folder carried to a host by OpenSSH's client, a command done in it there, and its results carried back.

Nothing is ever asked: keys, ports, jump hosts and known hosts are those of ~/.ssh/config, or of another file. A folder
goes as a tar stream without the files that are there already, by their hashes, so that a carrying that was cut off goes
on. Results appear here when all of them have come. The host has a POSIX shell, tar and Python.
"""

import json
import logging
import shlex
import shutil
import subprocess
import tarfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

from pipeline import digest
from pipeline.errors import UserError

_logger = logging.getLogger("pipeline.ssh")
_CONNECT_S = 20
_SILENT_S = 60  # without an answer after which a connection counts as dead
_OPTIONS = {
    "BatchMode": "yes",
    "ConnectTimeout": str(_CONNECT_S),
    "ServerAliveInterval": str(_SILENT_S // 4),
    "ServerAliveCountMax": "4",
}
_LAST_LINES = 5  # of what ssh said, in an error
RESULTS = "results"

_PARTIAL = ".results.partial"
# Prints the hash of each file below a folder but for its results.
_LIST = """
import hashlib, json, os, sys
top, found = sys.argv[1], {}
for folder, below, names in os.walk(top):
    if folder == top:
        below[:] = [name for name in below if name not in sys.argv[2:]]
    for name in names:
        file, sha256 = os.path.join(folder, name), hashlib.sha256()
        with open(file, "rb") as opened:
            for piece in iter(lambda: opened.read(1 << 20), b""):
                sha256.update(piece)
        found[os.path.relpath(file, top)] = sha256.hexdigest()
print(json.dumps(found))
"""
# Runs Python with the arguments, and ends it when standard input does: ssh has gone, or was told to stop.
_WATCHED = """
import os, subprocess, sys, threading
work = subprocess.Popen([sys.executable, *sys.argv[1:]], stdin=subprocess.DEVNULL)
def watch():
    os.read(0, 1)
    work.terminate()
threading.Thread(target=watch, daemon=True).start()
code = work.wait()
sys.exit(code if code >= 0 else 128 - code)
"""


@dataclass(frozen=True)
class Host:
    """Where ssh leads: the name that messages use, `user@host`, the Python there, another file than ~/.ssh/config."""

    name: str
    address: str
    python: str
    config: Path | None = None

    def command(self, *remote: str) -> list[str]:
        """Return the command line that has a shell there run some words."""
        options = [f"-o{name}={value}" for name, value in _OPTIONS.items()]
        config = ["-F", str(self.config)] if self.config else []
        return ["ssh", *config, *options, "--", self.address, *remote]

    def start(self, remote: str, out: int | IO[bytes], err: int | IO[bytes]) -> "subprocess.Popen[bytes]":
        """Start a command there, with pipes or files for what it says. Raises UserError when there is no ssh here."""
        try:
            # A session of its own: Ctrl-C reaches this process alone, which then ends the connection.
            return subprocess.Popen(
                self.command(remote), stdin=subprocess.PIPE, stdout=out, stderr=err, start_new_session=True
            )
        except FileNotFoundError:
            raise UserError(f"targets.{self.name}.ssh: there is no `ssh` here; install OpenSSH's client") from None

    def failure(self, doing: str, code: int, said: str) -> UserError:
        """Return the error of a command that ended with a code, having said something."""
        words = "; ".join(line.strip() for line in said.splitlines()[-_LAST_LINES:] if line.strip()) or "nothing"
        if code == 255:  # ssh's own
            config = f"-F {self.config} " if self.config else ""
            mend = f"see whether `ssh {config}{self.address} true` works without a question"
            return UserError(f"targets.{self.name}.ssh: {self.address} cannot be reached: {words}; {mend}")
        return UserError(f"targets.{self.name}: {doing} on {self.address} ended with {code}: {words}")


def do(host: Host, parent: str, folder: Path, command: Sequence[str]) -> None:
    """Carry a folder below `parent` there, run a command in it, and carry its `results` back into the folder.

    Raises UserError, with what was said there, when one of these fails; what was done there is found again next time.
    """
    there = f"{parent.rstrip('/')}/{folder.name}"
    _send(host, folder, there)
    _run(host, there, command)
    _fetch(host, there, folder)


def _send(host: Host, folder: Path, there: str) -> None:
    known = _hashes(host, there)
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    files = {name: path for name, path in files.items() if not name.startswith((f"{RESULTS}/", f"{_PARTIAL}/"))}
    missing = {name: path for name, path in files.items() if name not in known or known[name] != digest.of_file(path)}
    size = sum(path.stat().st_size for path in missing.values())
    _logger.info("%s: sending %d of %d files, %.1f MB", host.name, len(missing), len(files), size / 1e6)
    quoted = shlex.quote(there)
    with TemporaryFile() as said, host.start(f"mkdir -p {quoted} && tar -xmof - -C {quoted}", said, said) as process:
        assert process.stdin
        broken = False
        try:
            # Files of one content may be one inode here; there each is a file.
            with tarfile.open(fileobj=process.stdin, mode="w|", dereference=True) as tar:
                for name, path in missing.items():
                    tar.add(path, name)
            process.stdin.close()
        except BrokenPipeError:  # it has ended, and said why
            broken = True
            with suppress(BrokenPipeError):
                process.stdin.close()
        if process.wait() or broken:
            raise host.failure(f"unpacking what was sent to {there}", process.returncode, _text(said))


def _hashes(host: Host, there: str) -> dict[str, str]:
    """Return the hash of each file that is there already."""
    command = shlex.join([host.python, "-c", _LIST, there, RESULTS])
    with TemporaryFile() as said, host.start(command, subprocess.PIPE, said) as process:
        out, _ = process.communicate()
        if process.returncode:
            raise host.failure(f"looking for work with {host.python}", process.returncode, _text(said))
    return dict(json.loads(out.splitlines()[-1]))  # before it a login script may have its say


def _run(host: Host, there: str, command: Sequence[str]) -> None:
    python, *arguments = command
    line = f"cd {shlex.quote(there)} && exec {shlex.join([python, '-c', _WATCHED, *arguments])}"
    said: list[str] = []
    with host.start(line, subprocess.PIPE, subprocess.STDOUT) as process:
        assert process.stdout
        try:
            for spoken in process.stdout:
                said.append(spoken.decode(errors="replace").rstrip())
                _logger.info("%s: %s", host.name, said[-1])
        except BaseException:
            process.terminate()
            raise
        if process.wait():
            raise host.failure(f"the work in {there}", process.returncode, "\n".join(said))


def _fetch(host: Host, there: str, folder: Path) -> None:
    line = f"tar -cf - -C {shlex.quote(there)} {RESULTS}"
    partial = folder / _PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    with TemporaryFile() as said, host.start(line, subprocess.PIPE, said) as process:
        assert process.stdout
        broken = ""
        try:
            with tarfile.open(fileobj=process.stdout, mode="r|") as tar:
                tar.extractall(partial, filter="data")
        except tarfile.TarError as error:
            broken = str(error)
        process.stdout.read()
        if process.wait() or broken:
            raise host.failure(f"reading the results in {there}", process.returncode, f"{_text(said)}\n{broken}")
    shutil.rmtree(folder / RESULTS, ignore_errors=True)
    (partial / RESULTS).rename(folder / RESULTS)
    partial.rmdir()


def _text(said: IO[bytes]) -> str:
    said.seek(0)
    return said.read().decode(errors="replace")
