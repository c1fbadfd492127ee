"""Target: another machine that does the work of a stage, reached by ssh or by somebody who carries a folder.

    stage's `work` -> runs/work/USES-KEY/ -> there: the stage's command, in that folder -> results/ -> stage's `take`

What the work is, and by what program it is done, is the stage's affair. A target's name stands for one machine: the
first results that come back say which, and those of another are refused.
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from pipeline import digest, ssh
from pipeline.config import BaseConfig, ExternalFile
from pipeline.errors import UserError, Waiting
from pipeline.store import Store

if TYPE_CHECKING:
    from pipeline.artifact import Artifact
    from pipeline.graph import Node


class Target(BaseConfig):
    """A machine of `targets:` in a config."""

    ssh: str | None = Field(default=None, pattern=r"^[^-\s]\S*$")
    """`user@host`, or a host of ~/.ssh/config; without it a folder is carried there and back by hand."""
    ssh_config: ExternalFile | None = None
    """Another file than ~/.ssh/config, as for `ssh -F`: ports, keys, jump hosts, known hosts."""
    python: str = Field(default="python3", pattern=r"^[^-~]")
    """The Python there that has what the work needs: a name, or an absolute path."""
    folder: str = Field(default="headstart-work", pattern=r"^[^-~]")
    """Where work lies there, absolute or below the home; for ssh only."""
    device: str | None = None
    """A part of the machine's own name, as `Tesla T4`: results of a machine without it are refused."""


@dataclass(frozen=True)
class Place:
    """A target by its name, and the store that remembers which machine it is."""

    name: str
    target: Target
    store: Store

    def do(
        self, node: "Node", directory: Path, folder: Path, inputs: Mapping[str, Any]
    ) -> tuple["Artifact", dict[str, Any]]:
        """Return what a node's stage takes from the work that was done there, and what that machine says it is.

        `folder` is that of the work, here. Raises Waiting, with what is to be done by hand, when the work is not done
        and no ssh leads there, and UserError when another machine did it.
        """
        command = node.stage.work(node.config, folder, inputs)
        try:
            taken = node.stage.take(node.config, directory, folder, self.name, inputs)
        except Waiting as lacking:
            if self.target.ssh is None:
                raise Waiting(self._by_hand(folder, command, str(lacking))) from None
            ssh.do(self._host(), self.target.folder, folder, [self.target.python, *command])
            taken = node.stage.take(node.config, directory, folder, self.name, inputs)
        self._admit(taken[1], folder)
        return taken

    def _host(self) -> ssh.Host:
        assert self.target.ssh is not None
        config = self.target.ssh_config
        return ssh.Host(self.name, self.target.ssh, self.target.python, config.path if config else None)

    def _by_hand(self, folder: Path, command: Sequence[str], lacking: str) -> str:
        there = f"cd {folder.name} && {shlex.join([self.target.python, *command])}"
        return (
            f"waits for {self.name}: {lacking}; copy the folder {folder} there, run `{there}`, copy its results/ back "
            "into the folder here, and give the same command again"
        )

    def _admit(self, device: Mapping[str, Any], folder: Path) -> None:
        """Remember which machine this target is, or compare. Raises UserError when it is another one."""
        name = str(device.get("name", ""))
        if self.target.device is not None and self.target.device not in name:
            raise UserError(
                f"targets.{self.name}.device: the results are of '{name}', and '{self.target.device}' is asked for; do "
                f"the work there: remove {folder / 'results'} and give the same command again"
            )
        file = self.store.target(self.name)
        known = machine(self.store, self.name)
        if known is None:
            now = datetime.now(timezone.utc).isoformat(timespec="seconds")
            record = {"device": dict(device), "since": now}
            digest.write_atomically(file, json.dumps(record, indent=1).encode() + b"\n")
        elif differing := [key for key in {**known, **device} if known.get(key) != device.get(key)]:
            was, found = ({key: of.get(key) for key in differing} for of in (known, device))
            raise UserError(
                f"targets.{self.name}: the results are of another machine than before: {found}, was {was}; give another "
                f"machine another name, do the work again on the right one after removing {folder / 'results'}, or, "
                f"when it was replaced, remove {file}"
            )


def machine(store: Store, name: str) -> dict[str, Any] | None:
    """Return what the machine of a target said it is when its first results came back; None before."""
    file = store.target(name)
    return dict(json.loads(file.read_text())["device"]) if file.is_file() else None
