"""Stage: what a module of the stages' package takes and gives, read off its `Config` and its `run`.

    class Config(BaseConfig): ...
    def run(config: Config, directory: Path, *, checkpoint: Checkpoint, data: Dataset | None = None) -> Bundle: ...

The keyword parameters are slots: `T` needs one artifact, `T | None = None` may lack one, `list[T]` gathers many,
`list[T] | None = None` takes those that are named, or the one of its own name, or none.

A module may also have `check(config, wired)`, which yields problems, `identity(config)`, which returns what of the
machine the result depends on, `RESUMES = True`, if a killed run is to find its partial directory as it left it,
`SCRATCH = ("last.ckpt",)`, files that only a killed run needs and no artifact keeps, `SIDE_BY_SIDE = True`, if it may
run beside others with a share of the cores, and `CODE = ("deploy.backends.onnxruntime",)`, modules whose code counts as
its own though it imports them by computed names. `show(config, out)` lets people look at what the settings name, before
anything is run: it writes a file `out` with a suffix of its own, and returns lines to print.

A stage that another machine can do (`target:` in a config) also has

    def work(config: Config, folder: Path, *, data: Dataset) -> list[str]: ...
    def take(config: Config, directory: Path, folder: Path, target: str, *, data: Dataset) -> tuple[Bundle, dict]: ...

`work` leaves in `folder` all that must be carried there, the same again when it is called again, and returns the
arguments of the Python that does it in that folder and leaves what it makes in `results/`. `take` returns the artifact
made of these, and what the machine says it is, with its `name`; it raises Waiting while results lack. `target` is the
name that the config gives the machine. The keyword parameters of `work` are the slots then.
"""

import inspect
import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Union, get_args, get_origin, get_type_hints

from pipeline import lookup
from pipeline.artifact import Artifact
from pipeline.config import BaseConfig
from pipeline.errors import UserError


@dataclass(frozen=True)
class Slot:
    """An edge that a stage's `run` asks for: what fits, and how many."""

    name: str
    kinds: tuple[type[Artifact], ...]
    many: bool = False
    optional: bool = False

    @property
    def gathers(self) -> bool:
        """Whether it takes, unasked, all that fits."""
        return self.many and not self.optional

    def fits(self, produces: type[Artifact]) -> bool:
        """Return whether a stage's result may be put here."""
        return issubclass(produces, self.kinds)

    def __str__(self) -> str:
        kinds = " or ".join(kind.__name__ for kind in self.kinds)
        if self.many:
            return f"one or several {kinds} or nothing" if self.optional else f"list of {kinds}"
        return f"{kinds} or nothing" if self.optional else kinds


@dataclass(frozen=True, eq=False)
class NodeView(ABC):
    """What a stage's `check` sees of a node: its name, its stage's file name, its settings, its result's type, and the
    nodes behind it."""

    name: str
    uses: str
    config: BaseConfig
    produces: type[Artifact]

    @abstractmethod
    def feeding(self, slot: str) -> tuple["NodeView", ...]:
        """Return the nodes that feed one of its slots, none, one or many; none where it has no such slot."""


@dataclass(frozen=True)
class Stage:
    """A stage module, read."""

    name: str
    module: ModuleType
    config: type[BaseConfig]
    slots: Mapping[str, Slot]
    produces: type[Artifact]
    resumes: bool
    code: tuple[str, ...] = ()
    scratch: tuple[str, ...] = ()
    side_by_side: bool = False

    @property
    def summary(self) -> str:
        """The first line of the module's docstring."""
        return (inspect.getdoc(self.module) or "").partition("\n")[0]

    @property
    def portable(self) -> bool:
        """Whether another machine can do it."""
        return all(inspect.isfunction(getattr(self.module, name, None)) for name in ("work", "take"))

    def elsewhere(self) -> "Stage":
        """Return the stage as another machine does it. Raises UserError when none can."""
        if not self.portable:
            raise UserError(f"{self.name} can only be done here; leave it out")
        return replace(self, slots=_slots(self.module.work, self.module), side_by_side=False)

    def work(self, config: BaseConfig, folder: Path, inputs: Mapping[str, Any]) -> list[str]:
        """Call the module's `work`: what is to be done elsewhere is in the folder then, and the command returned."""
        return list(self.module.work(config, folder, **inputs))

    def take(
        self, config: BaseConfig, directory: Path, folder: Path, target: str, inputs: Mapping[str, Any]
    ) -> tuple[Artifact, dict[str, Any]]:
        """Call the module's `take`. Raises TypeError when it does not return what `run` says it does."""
        result, device = self.module.take(config, directory, folder, target, **inputs)
        if not isinstance(result, self.produces):
            raise TypeError(f"{self.name}.take returned {result!r}, not a {self.produces.__name__}")
        return result, dict(device)

    def run(self, config: BaseConfig, directory: Path, inputs: Mapping[str, Any]) -> Artifact:
        """Call the module's `run`. Raises TypeError when it does not return what it says it does."""
        result = self.module.run(config, directory, **inputs)
        if not isinstance(result, self.produces):
            raise TypeError(f"{self.name}.run returned {result!r}, not a {self.produces.__name__}")
        return result

    def check(self, config: BaseConfig, wired: Mapping[str, Sequence[NodeView]]) -> list[str]:
        """Return the problems that the module sees in settings and wiring together."""
        check: Callable[..., Iterable[str]] | None = getattr(self.module, "check", None)
        return list(check(config, wired)) if check else []

    def show(self, config: BaseConfig, out: Path) -> list[str]:
        """Return what there is to say of what the settings name, after drawing it to `out` and a suffix."""
        show: Callable[..., Iterable[str]] | None = getattr(self.module, "show", None)
        return list(show(config, out)) if show else []

    def identity(self, config: BaseConfig) -> dict[str, Any] | None:
        """Return what of the machine the result depends on, or None when it depends on nothing of it."""
        identity: Callable[..., dict[str, Any]] | None = getattr(self.module, "identity", None)
        return identity(config) if identity else None


def find(package: str, uses: str) -> Stage:
    """Return the stage of a name, or of a path to a user's own file.

    Raises UserError when there is none or the file is not a stage.
    """
    if lookup.is_path(uses):
        return _read(Path(uses).stem, lookup.from_path(uses))
    return _read(uses, lookup.module(package, uses))


def _read(name: str, module: ModuleType) -> Stage:
    config, run = getattr(module, "Config", None), getattr(module, "run", None)
    if not (isinstance(config, type) and issubclass(config, BaseConfig)) or not inspect.isfunction(run):
        raise UserError(f"{module.__file__}: a stage is a `class Config(BaseConfig)` and a function `run`")
    produces = get_type_hints(run).get("return")
    if not (isinstance(produces, type) and issubclass(produces, Artifact)):
        raise UserError(f"{module.__file__}: run must say which Artifact it returns, says {produces!r}")
    resumes, code = getattr(module, "RESUMES", False), getattr(module, "CODE", ())
    scratch = getattr(module, "SCRATCH", ())
    beside = getattr(module, "SIDE_BY_SIDE", False)
    return Stage(name, module, config, _slots(run, module), produces, resumes, tuple(code), tuple(scratch), beside)


def _slots(function: Callable[..., Any], module: ModuleType) -> dict[str, Slot]:
    hints = get_type_hints(function)
    parameters = inspect.signature(function).parameters.values()
    return {p.name: _slot(p.name, hints.get(p.name), module) for p in parameters if p.kind is p.KEYWORD_ONLY}


def _slot(name: str, hint: Any, module: ModuleType) -> Slot:
    given = _alternatives(hint)
    kinds = tuple(kind for kind in given if kind is not types.NoneType)
    many = len(kinds) == 1 and get_origin(kinds[0]) is list
    artifacts = _alternatives(get_args(kinds[0])[0]) if many else kinds
    if not artifacts or not all(isinstance(kind, type) and issubclass(kind, Artifact) for kind in artifacts):
        raise UserError(f"{module.__file__}: run's '{name}' must be an Artifact, one or None, or a list; is {hint!r}")
    return Slot(name, artifacts, many, optional=len(kinds) < len(given))


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
