"""A bakery: a small package of stages, copied into a fresh folder for each test, and run there."""

import importlib
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.__main__ import main
from pipeline.graph import Graph, load

REPOSITORY = Path(__file__).parents[2]

CONFIG = """
stages:
  flour: {uses: grind}
  dough: {uses: knead}
  bread: {uses: bake}
  verdict: {uses: taste}
"""


class Kitchen:
    """A folder with a bakery of its own, whose code tests may change."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self.diary = folder / "diary.txt"
        self.out = self.err = ""
        self._capsys = capsys
        self.write("c.yaml", CONFIG)

    def write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def edit(self, name: str, old: str, new: str) -> None:
        path = self.folder / "bakery" / name
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    def forget(self) -> None:
        """Drop the imported bakery, as a fresh process would."""
        for name in [name for name in sys.modules if name.split(".")[0] == "bakery" or name.startswith("user_file_")]:
            del sys.modules[name]
        importlib.invalidate_caches()

    def load(self, text: str, *overrides: str) -> Graph:
        self.forget()
        return load(text, overrides, "bakery", where="c.yaml")

    def pipeline(self, *arguments: str) -> int:
        """Run a command line in this process as a fresh one would; `out` and `err` are what it printed."""
        self.forget()
        self._capsys.readouterr()
        package = [] if arguments[0].startswith("-") else ["--package", "bakery"]
        try:
            return main([*arguments, *package])
        finally:
            self.out, self.err = self._capsys.readouterr()

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "pipeline", *arguments, "--package", "bakery"]

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        """Start a command line as a process of its own."""
        pipe = subprocess.PIPE
        return subprocess.Popen(self.command(*arguments), cwd=self.folder, stdout=pipe, stderr=pipe, text=True)

    def took(self) -> list[str]:
        """Return the diary so far and start a new one."""
        lines = self.diary.read_text().splitlines() if self.diary.exists() else []
        self.diary.unlink(missing_ok=True)
        return lines

    def made(self) -> list[str]:
        """Return the stage files of the artifacts in the store."""
        return sorted(path.parent.name.rpartition("-")[0] for path in (self.folder / "runs").glob("*/artifact.json"))

    def artifact(self, node: str) -> Path:
        return (self.folder / "runs" / "latest" / node).resolve()


@pytest.fixture
def kitchen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Kitchen]:
    """A fresh folder with the bakery in it, as the current folder."""
    shutil.copytree(Path(__file__).parent / "bakery", tmp_path / "bakery", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("BAKERY_DIARY", str(tmp_path / "diary.txt"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(REPOSITORY)]))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # two edits within a second must not meet a stale .pyc
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    handler = signal.getsignal(signal.SIGTERM)
    kitchen = Kitchen(tmp_path, capsys)
    yield kitchen
    kitchen.forget()
    signal.signal(signal.SIGTERM, handler)
    for name in ("headstart", "pipeline", "stages", "deploy"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
