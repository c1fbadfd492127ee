"""Plan: the keys of a graph's nodes, what of it is done, and the remembered plan that needs no imports.

A key is the sha256 of the stage's file name, the settings with defaults, the inputs' keys, the code and the identity.
All keys are known before anything runs. A plan is remembered under the hash of everything it was made from, so that a
run in which nothing has changed imports no stage, and with it no framework.
"""

import importlib
import importlib.util
import json
import os
import platform
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from pipeline import digest
from pipeline.digest import Digests
from pipeline.errors import ConfigError, did_you_mean
from pipeline.matrix import Reference
from pipeline.provenance import versions
from pipeline.store import Finished, Store

if TYPE_CHECKING:
    from pipeline.graph import Graph, Node

FIRST_PARTY = ("deploy",)
"""Packages whose code counts as ours wherever it is installed, beside the package of the stages."""

_CPUS, _BOARD = Path("/proc/cpuinfo"), Path("/proc/device-tree/model")


def read(path: Path) -> bytes:
    """Return the bytes of a config file. Raises ConfigError, with a close name, when it cannot be read."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        near = sorted(p.name for p in path.parent.glob("*.y*ml"))
        raise ConfigError([f"{path}: no such file{did_you_mean(path.name, near)}"]) from None
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read: {error.strerror}"]) from None


@dataclass(frozen=True)
class Step:
    """A node with its key: all that is needed to know whether it is done."""

    name: str
    entry: str
    axes: Mapping[str, Any]
    uses: str
    key: str
    parts: Mapping[str, Any]  # what the key is the hash of
    settings: Mapping[str, Any]  # resolved, as given: for people
    inputs: Mapping[str, list[str]]  # node names by slot
    defaults: list[str]  # dotted names of the settings that stand at their defaults
    target: str = ""  # the machine that does it; empty for this one

    @property
    def feeding(self) -> list[str]:
        """The names of the nodes that feed it."""
        return [name for names in self.inputs.values() for name in names]

    @property
    def input_keys(self) -> dict[str, str]:
        """The keys of the nodes that feed it, by their names."""
        found: dict[str, str] = {}
        for slot, names in self.inputs.items():
            given = self.parts["inputs"][slot]
            keys = [given] if isinstance(given, str) else [key for _, key in given or []]
            found.update(zip(names, keys, strict=True))
        return found


@dataclass(frozen=True)
class Plan:
    """The steps of a config in order, and the outside files and folders that they depend on, with their digests."""

    steps: tuple[Step, ...]
    files: Mapping[str, str] = field(default_factory=dict)
    folders: Mapping[str, str] = field(default_factory=dict)

    def select(self, names: Iterable[str], option: str) -> frozenset[str]:
        """Return the names of the nodes that stage or node names mean; `option` begins the lines of the problems.

        Raises ConfigError when one means none.
        """
        found: set[str] = set()
        problems = []
        for name in names:
            try:
                reference = Reference.parse(name)
            except ValueError as error:
                problems.append(f"{option} {name}: {error}")
                continue
            nodes = [s.name for s in self.steps if s.entry == reference.stage and reference.selects(s.axes)]
            if not nodes:
                known = dict.fromkeys(name for step in self.steps for name in (step.entry, step.name))
                problems.append(f"{option} {name}: no such stage{did_you_mean(name, known)}")
            found.update(nodes)
        if problems:
            raise ConfigError(problems)
        return frozenset(found)

    def upto(self, names: Iterable[str]) -> list[Step]:
        """Return the steps of these names and all that feed them; of no names, all steps."""
        wanted = set(names) or {step.name for step in self.steps}
        for step in reversed(self.steps):
            if step.name in wanted:
                wanted.update(step.feeding)
        return [step for step in self.steps if step.name in wanted]


def make(graph: "Graph", digests: Digests, package: str) -> Plan:
    """Compute the keys of a graph's nodes. Raises OSError when an outside file has gone meanwhile."""
    from pipeline.config import at_default
    from pipeline.fingerprint import Fingerprints

    fingerprints = Fingerprints([package.partition(".")[0], *FIRST_PARTY])
    keys: dict[str, str] = {}
    files: dict[str, str] = {}
    folders: dict[str, str] = {}
    roots = _roots(package)
    steps = []
    for node in graph.nodes:
        modules = [node.stage.module, *_chosen_modules(node.config)]
        closure = fingerprints.closure(modules, node.stage.code)
        parts = {
            "uses": node.uses,
            "settings": _canonical(node.config, digests, files, folders),
            "inputs": {slot: _input_keys(node, slot, keys) for slot in node.inputs},
            "code": fingerprints.of(modules, node.stage.code),
            "identity": {"target": node.target} if node.target else node.stage.identity(node.config),
        }
        keys[node.name] = key = digest.of_values(parts)
        settings = node.config.model_dump(mode="json")
        inputs = {slot: [fed.name for fed in node.feeding(slot)] for slot in node.inputs}
        steps.append(
            Step(
                node.name,
                node.entry,
                dict(node.axes),
                node.uses,
                key,
                parts,
                settings,
                inputs,
                list(at_default(node.config)),
                node.target,
            )
        )
        # A user's own file lies where no remembered plan would look: it is one more outside file.
        for name, path in closure:
            if not any(path.is_relative_to(root) for root in roots):
                files[str(path.absolute())] = digests.file(path)
            elif name not in sys.modules:
                # Now, and not hours later inside some function: what runs must be what was hashed, whatever is edited.
                with suppress(ImportError):
                    importlib.import_module(name)
    return Plan(tuple(steps), files, folders)


def _input_keys(node: "Node", slot: str, keys: Mapping[str, str]) -> Any:
    """Return what an input adds to the key; results of a list slot are labelled by node names, so these count too."""
    fed = node.feeding(slot)
    if node.stage.slots[slot].many:
        return [[other.name, keys[other.name]] for other in fed]
    return keys[fed[0].name] if fed else None


def _canonical(value: Any, digests: Digests, files: dict[str, str], folders: dict[str, str]) -> Any:
    """Return settings as JSON values that are equal when the results are: outside files by content, not by path."""
    from pydantic import BaseModel
    from pydantic_core import to_jsonable_python

    from pipeline.config import Choice, ExternalFile, ExternalFolder

    def walk(value: Any) -> Any:
        if isinstance(value, ExternalFile):
            files[str(value.path)] = digests.file(value.path)
            return {"sha256": files[str(value.path)]}
        if isinstance(value, ExternalFolder):
            folders[str(value.path)] = digest.of_folder(value.path)
            return {"manifest": folders[str(value.path)]}
        if isinstance(value, Choice):
            return {"name": Path(value.name).stem, **walk(value.config)}
        if isinstance(value, BaseModel):
            return {name: walk(getattr(value, name)) for name in type(value).model_fields}
        if isinstance(value, Mapping):
            return {str(key): walk(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [walk(item) for item in value]
        return to_jsonable_python(value)

    return walk(value)


def _chosen_modules(value: Any) -> Iterator[ModuleType]:
    """Yield the modules of all choices in settings, and of the choices in theirs."""
    from pydantic import BaseModel

    from pipeline.config import Choice

    if isinstance(value, Choice):
        yield sys.modules[value.module]
        yield from _chosen_modules(value.config)
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from _chosen_modules(getattr(value, name))
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _chosen_modules(item)


def _roots(package: str) -> list[Path]:
    """Return the folders of the engine and of the first-party packages, without importing them."""
    found = [Path(__file__).parent]
    for name in (package.partition(".")[0], *FIRST_PARTY):
        spec = importlib.util.find_spec(name)
        found += [Path(folder) for folder in (spec.submodule_search_locations or [] if spec else [])]
    return found


def cores() -> int | None:
    """Return how many cores this process may use: `taskset` and containers leave it fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _processor() -> str:
    """Return the line that names the processor, or the board where none does; nothing where that is not told."""
    with suppress(OSError), _CPUS.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:  # no further than the first: there is one for each of maybe hundreds of cores
            if line.lower().startswith(("model name", "hardware")):
                return line
    return _BOARD.read_text(errors="replace") if _BOARD.is_file() else ""


def surroundings(package: str) -> str:
    """Return the hash of what every plan made here and now depends on: our sources, versions, machine, folder."""
    sources = [path for root in _roots(package) for path in root.rglob("*.py")]
    devices = [Path("/proc/driver/nvidia/version"), *Path("/proc/driver/nvidia/gpus").glob("*")]
    facts = {
        "sources": [(str(path), digest.of_file(path)) for path in sorted(sources)],
        "versions": versions(),
        "python": platform.python_version(),
        # Only what `identity` of a stage may look at without our knowing: a remembered plan must not outlive it.
        "machine": [platform.node(), platform.machine(), os.environ.get("CUDA_VISIBLE_DEVICES")],
        "processor": [cores(), _processor()],
        "devices": [path.read_text() if path.is_file() else path.name for path in devices if path.exists()],
        "folder": os.getcwd(),
        "package": package,
    }
    return digest.of_values(facts)


class Memory:
    """The remembered plans of a store, found by config, overrides and surroundings."""

    def __init__(self, store: Store, package: str) -> None:
        self._folder = store.root / ".plans"
        self._surroundings = surroundings(package)

    def _file(self, config: bytes, overrides: Sequence[str]) -> Path:
        return self._folder / f"{digest.of_values([self._context(config), list(overrides)])[:32]}.json"

    def _context(self, config: bytes) -> str:
        return digest.of_values([config.decode("utf-8", "replace"), self._surroundings])

    def recall(self, config: bytes, overrides: Sequence[str], digests: Digests) -> Plan | None:
        """Return the plan of a config as it was made before, if nothing that it depends on has changed."""
        try:
            return _intact(json.loads(self._file(config, overrides).read_text()), digests)
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def remember(self, config: bytes, overrides: Sequence[str], plan: Plan) -> None:
        """Keep a plan."""
        values = {"surroundings": self._surroundings, "context": self._context(config), **asdict(plan)}
        digest.write_atomically(self._file(config, overrides), json.dumps(values).encode())

    def variants(self, config: bytes) -> list[Plan]:
        """Return the remembered plans of a config under any overrides, unless the code has changed since."""
        remembered = (json.loads(file.read_text()) for file in self._folder.glob("*.json"))
        return [_plan(values) for values in remembered if values["context"] == self._context(config)]

    def forget_outdated(self) -> None:
        """Remove the plans that were made by other code or versions: nothing will ask for them again."""
        for file in self._folder.glob("*.json"):
            if json.loads(file.read_text())["surroundings"] != self._surroundings:
                file.unlink()


def _intact(values: Mapping[str, Any], digests: Digests) -> Plan | None:
    try:
        same_files = all(digests.file(Path(path)) == known for path, known in values["files"].items())
        same = same_files and all(digest.of_folder(Path(path)) == known for path, known in values["folders"].items())
    except OSError:  # gone: the config says so when it is read again
        return None
    return _plan(values) if same else None


def _plan(values: Mapping[str, Any]) -> Plan:
    return Plan(tuple(Step(**step) for step in values["steps"]), values["files"], values["folders"])


def done(step: Step, store: Store, contents: Mapping[str, str]) -> Finished | None:
    """Return a step's artifact if it is whole and was made from these inputs.

    `contents` are the digests of the artifacts that are there, by node name: an input that was made again, with
    --force, and came out different makes what was made from it stale, though the keys are the same.
    """
    finished = store.finished(step.uses, step.key)
    if finished is None:
        return None
    made_from = {fed["key"]: fed["content"] for slot in finished.provenance["inputs"].values() for fed in slot}
    now = {key: contents[name] for name, key in step.input_keys.items() if name in contents}
    return finished if all(made_from.get(key, content) == content for key, content in now.items()) else None


def complete(steps: Sequence[Step], store: Store) -> bool:
    """Return whether every step is done, or left out behind a failed gate: nothing needs to be imported."""
    contents: dict[str, str] = {}
    stopped: set[str] = set()
    for step in steps:
        if not stopped.isdisjoint(step.feeding):
            stopped.add(step.name)
            continue
        finished = done(step, store, contents)
        if finished is None:
            return False
        contents[step.name] = finished.content
        if finished.failures:
            stopped.add(step.name)
    return True
