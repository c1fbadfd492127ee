"""Sidecar: what an engine is, in `FILE.json` beside it. The engine file itself is left as its runtime wrote it.

So trtexec and every other tool loads it. An engine without its sidecar, with that of another file, or for another
device is refused, with the command that builds one that fits.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy import atomic
from deploy.digest import digest
from deploy.errors import DeployError

if TYPE_CHECKING:
    from deploy.census import Census

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Sidecar:
    """`made_for` is what a machine must have to run the engine, such as `compute_capabilities` and `version`;
    `census` is a Census; `contract` that of the ONNX file."""

    backend: str
    engine_sha256: str
    engine_bytes: int
    onnx: str  # its file name
    onnx_sha256: str
    made_for: dict[str, Any]
    settings: dict[str, Any]
    census: dict[str, Any]
    contract: str  # JSON, as it stands in the ONNX file
    built_by: dict[str, Any] = field(default_factory=dict)  # versions, device, seconds, timing cache
    schema_version: int = SCHEMA_VERSION

    @property
    def command(self) -> str:
        """What builds such an engine again, for the device at hand: without which devices this one is for."""
        import shlex

        words = ["deploy", "build", self.onnx, "ENGINE", "--backend", self.backend]
        for name, value in self.settings.items():
            if value is not None and name not in ("compute_capabilities", "timing_cache"):
                words += ["--set", f"{name}={value if isinstance(value, str) else json.dumps(value)}"]
        return shlex.join(words)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def write(self, engine: Path) -> Path:
        """Writes it beside the engine, as a whole or not at all."""
        file = beside(engine)
        atomic.write(file, (json.dumps(self.to_dict(), indent=1, sort_keys=True) + "\n").encode())
        return file


def beside(engine: Path) -> Path:
    """Where the sidecar of an engine lies."""
    return engine.with_name(f"{engine.name}.json")


def read(engine: Path, backend: str) -> Sidecar:
    """The sidecar of an engine of this backend. Raises DeployError where it lacks, is another file's or another
    backend's."""
    found = peek(engine)
    mend = f"copy engine and sidecar together, or build one here: deploy build MODEL.onnx ENGINE --backend {backend}"
    if not engine.is_file():
        raise DeployError(f"{engine}: no such engine file; {mend}")
    if found is None:
        raise DeployError(f"{engine}: its sidecar {beside(engine).name} is missing; {mend}")
    if found.backend != backend:
        raise DeployError(
            f"{engine}: it is an engine of {found.backend}, not of {backend}; open it with {found.backend}"
        )
    if (given := digest(engine)["sha256"]) != found.engine_sha256:
        raise DeployError(
            f"{engine}: its sidecar is of another file (sha256 {found.engine_sha256[:12]}, this one has {given[:12]}); "
            f"copy both again, or build one: {found.command}"
        )
    return found


def peek(engine: Path) -> Sidecar | None:
    """The sidecar beside a file, unchecked against it; None where there is none. Raises DeployError where it cannot be
    read."""
    file = beside(Path(engine))
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DeployError(f"{file}: a sidecar is wanted ({error}); copy it again") from error
    known = {one.name for one in fields(Sidecar)}
    if not isinstance(values, dict) or set(values) != known or values["schema_version"] != SCHEMA_VERSION:
        raise DeployError(
            f"{file}: not a sidecar of schema {SCHEMA_VERSION}; use the release of Headstart that wrote it"
        )
    return Sidecar(**values)


def publish(
    engine: Path,
    content: bytes,
    onnx: Path,
    *,
    backend: str,
    contract: str,
    made_for: dict[str, Any],
    settings: dict[str, Any],
    census: Census,
    built_by: dict[str, Any],
) -> Sidecar:
    """Writes an engine and its sidecar, in place of those that are there. The old sidecar goes first and the new one
    comes last: at no time does one stand beside a file that it does not describe."""
    beside(engine).unlink(missing_ok=True)
    atomic.write(engine, content)
    found = Sidecar(
        backend=backend,
        engine_sha256=hashlib.sha256(content).hexdigest(),
        engine_bytes=len(content),
        onnx=onnx.name,
        onnx_sha256=digest(onnx)["sha256"],
        made_for=made_for,
        settings=settings,
        census=census.to_dict(),
        contract=contract,
        built_by=built_by,
    )
    found.write(engine)
    return found


def remove(engine: Path) -> None:
    """Removes an engine and its sidecar, where they are."""
    beside(engine).unlink(missing_ok=True)
    engine.unlink(missing_ok=True)
