"""For all tests: one core and one thread for each process of theirs, the longest files first, and a Ctrl-C that arrives.

The models are tiny, and two threads wait for each other when the machine is busy: ONNX Runtime's spin while they wait,
and take their core from the other process. A shell that starts the tests in the
background has them ignore Ctrl-C, and so would the processes that tests start and interrupt.
"""

import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # before torch or numpy is imported, here and in the processes that tests start
if (_worker := os.environ.get("PYTEST_XDIST_WORKER")) and hasattr(os, "sched_setaffinity"):
    _cores = sorted(os.sched_getaffinity(0))  # what tests start inherits it, and our runtime takes no more threads
    os.sched_setaffinity(0, {_cores[int(_worker.removeprefix("gw")) % len(_cores)]})
signal.signal(signal.SIGINT, signal.default_int_handler)

# What a device need not have: what trains, and our other packages. `deploy` must come from the folder that was carried.
_BARE = """
import sys
class Refused:
    names = ("click", "matplotlib", "onnx", "pipeline", "pydantic", "rich", "stages", "torch", "torchvision", "yaml")
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ImportError(f"{name}: a device has none")
sys.meta_path.insert(0, Refused())
"""


# Files that take longest: begun first, so that at the end no process waits minutes for the other's last file.
_LONGEST = (
    "test_interruptions.py",
    "test_quantize.py",
    "test_contracts.py",
    "test_equals_torchvision.py",
    "test_beside.py",
    "test_backbones.py",
    "test_precision.py",
    "test_chain.py",
    "test_starter.py",
    "test_external_real.py",
    "test_build_engine.py",
    "test_target.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Longest files first, the others as they were; within a file nothing moves."""
    places = {name: place for place, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture(scope="session")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that refuses to import what a device has not: this one, started by a script."""
    folder = tmp_path_factory.mktemp("bare")
    (folder / "sitecustomize.py").write_text(_BARE)
    script = folder / "python"
    script.write_text(f'#!/bin/sh\nPYTHONPATH={folder} PYTHONDONTWRITEBYTECODE=1 exec {sys.executable} "$@"\n')
    script.chmod(0o755)
    return script


@dataclass(frozen=True)
class SshServer:
    """A server of this machine's OpenSSH, on a port and with keys of its own: `ssh -F config box` leads to it."""

    config: Path
    log: Path


@pytest.fixture(scope="session")
def ssh_server(tmp_path_factory: pytest.TempPathFactory):
    """OpenSSH's server on a free port, for this user, with fresh keys; it ends with the tests."""
    programs = [shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") for name in ("sshd", "ssh", "ssh-keygen")]
    if not all(programs):
        pytest.skip("OpenSSH's server, client or ssh-keygen is not installed (Debian: openssh-server)")
    folder = tmp_path_factory.mktemp("ssh")
    for name in ("host", "key"):
        subprocess.run([programs[2], "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/key.pub\n"
        f"StrictModes no\nPasswordAuthentication no\nPidFile {folder}/pid\n"
    )
    host_key = " ".join((folder / "host.pub").read_text().split()[:2])
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {host_key}\n")
    (folder / "config").write_text(
        f"Host box\n  HostName 127.0.0.1\n  Port {port}\n  User {getpass.getuser()}\n  IdentityFile {folder}/key\n"
        f"  IdentitiesOnly yes\n  UserKnownHostsFile {folder}/known_hosts\n"
    )
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # root's server wants this empty folder, which the system's start makes
    command = [programs[0], "-D", "-f", folder / "sshd_config", "-E", folder / "log"]
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        for _ in range(600):
            if (folder / "pid").exists() or server.poll() is not None:
                break
            time.sleep(0.05)
        if server.poll() is not None:
            pytest.skip(f"sshd does not start here: {(folder / 'log').read_text()}")
        yield SshServer(folder / "config", folder / "log")
    finally:
        server.terminate()
        server.wait()
