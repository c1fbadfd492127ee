"""Artifact: a frozen record that points at files; what a stage returns and another takes.

The fields are JSON and are written to `artifact.json`; fields that name files are paths relative to that file's folder.
"""

import json
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, PrivateAttr

from pipeline.errors import UserError


class Artifact(BaseModel):
    """What one stage made.

    A stage returns one that lies nowhere yet; the engine hands it to consumers placed: with its directory, node name
    and key.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=True, ser_json_inf_nan="constants")

    incidental: ClassVar[tuple[str, ...]] = ()
    """Fields that measure the making, as its seconds, or name a file or folder that does: two artifacts that differ in
    these alone have the same content."""

    failures: tuple[str, ...] = ()
    """Gates that failed, one sentence each: the artifact is published, nothing downstream runs, the command exits 3."""

    _directory: Path | None = PrivateAttr(default=None)
    _name: str = PrivateAttr(default="")
    _key: str = PrivateAttr(default="")

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        """Raise TypeError when `incidental` names what is no field."""
        unknown = [name for name in cls.incidental if name not in cls.model_fields]
        if unknown:
            raise TypeError(f"{cls.__name__}.incidental: {', '.join(unknown)} is no field of it")

    @property
    def directory(self) -> Path:
        """The absolute folder of the files. Raises RuntimeError before the artifact is placed."""
        if self._directory is None:
            raise RuntimeError(f"{type(self).__name__}: lies in no directory yet; use .placed(directory)")
        return self._directory

    @property
    def name(self) -> str:
        """The name of the node that made it in this config, as `student[seed=0]`; empty before it is placed."""
        return self._name

    @property
    def key(self) -> str:
        """The hash of what made it; empty before it is placed."""
        return self._key

    @property
    def provenance(self) -> dict[str, Any]:
        """How it was made: commit, versions, times, settings, inputs; empty when that was not recorded."""
        file = self.directory / "provenance.json"
        return dict(json.loads(file.read_text())) if file.is_file() else {}

    def path(self, relative: str) -> Path:
        """Return the absolute path of one of its files."""
        return self.directory / relative

    def placed(self, directory: Path, *, name: str = "", key: str = "") -> Self:
        """Return the same record as lying in a directory, under a node's name and a key."""
        copy = self.model_copy()
        copy._directory, copy._name, copy._key = Path(directory).absolute(), name, key
        return copy

    @classmethod
    def load(cls, directory: Path, *, name: str = "", key: str = "") -> Self:
        """Read `artifact.json` of a directory.

        Raises UserError when it is missing or is not such a record, as after a change of the class.
        """
        file = Path(directory) / "artifact.json"
        try:
            record = cls.model_validate_json(file.read_bytes())
        except FileNotFoundError:
            raise UserError(f"{file}: missing; this is not a finished artifact, run its stage again") from None
        except ValueError as error:
            raise UserError(f"{file}: not a {cls.__name__}; run its stage again with --force\n{error}") from error
        return record.placed(directory, name=name, key=key)
