"""Graph: the wired, typed, ordered, checked nodes of one config, or every problem that it has.

    YAML -> entries (uses, settings, matrix) -> edges between stages -> nodes, one a combination -> each stage's `check`

Nothing heavy runs here, but the stage modules are imported: their `Config` and `run` say what is right.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline import config as settings_of
from pipeline import document, matrix
from pipeline.config import BaseConfig
from pipeline.errors import ConfigError, UserError, did_you_mean
from pipeline.matrix import Axes
from pipeline.plan import read
from pipeline.stage import NodeView, Stage, find
from pipeline.target import Target
from pipeline.wiring import Entry, order, wire

_Row = tuple[Axes, BaseConfig, dict[str, Any]]  # of a fan-out: axes, settings, what fills each slot so far
_Choices = list[tuple[Axes, "Node"]]  # the nodes that one reference may mean, with their free axes

_RESERVED = ("uses", "needs", "matrix", "target")


@dataclass(frozen=True, eq=False)
class Node(NodeView):
    """One run of a stage: its settings and, for every slot, the nodes that feed it."""

    entry: str
    axes: Axes
    stage: Stage
    inputs: Mapping[str, "Node | tuple[Node, ...] | None"]
    target: str = ""
    """The name of the machine that does it; empty for this one."""

    def feeding(self, slot: str) -> tuple["Node", ...]:
        """Return the nodes of a slot, none, one or many; none where there is no such slot."""
        given = self.inputs.get(slot)
        return given if isinstance(given, tuple) else (given,) if given else ()


@dataclass(frozen=True)
class Graph:
    """The nodes of a config, each after those that feed it, how many may run at once, and the other machines."""

    nodes: tuple[Node, ...]
    jobs: int = 1
    targets: Mapping[str, Target] = field(default_factory=dict)

    @property
    def by_name(self) -> dict[str, Node]:
        """The nodes by their names."""
        return {node.name: node for node in self.nodes}


def load(config: Path | str, overrides: Sequence[str] = (), package: str = "stages", where: str = "config") -> Graph:
    """Read a config, a file or a YAML text, whose stages are the modules of `package`.

    `where` begins the lines about the form of a text. Raises ConfigError with everything that is wrong, one line each.
    """
    text = config if isinstance(config, str) else read(config).decode("utf-8", "replace")
    where = where if isinstance(config, str) else str(config)
    values, problems = document.parse(text, where)
    if not _has_stages(values):
        raise ConfigError([*problems, f"{where}: must begin with 'stages:' and below it the stages by name"])
    problems += document.override(values, overrides)
    if not _has_stages(values):
        raise ConfigError([*problems, "--set stages: leaves no stages by name; set one, as stages.NAME={uses: FILE}"])
    problems += _problems_beside_stages(values)
    targets, wrong = _targets(values.get("targets"))
    problems += wrong
    entries = {}
    for name, given in values["stages"].items():
        entry, wrong = _entry(str(name), given, package, targets)
        entries[entry.name] = entry
        problems += wrong
    problems += wire(entries)
    ordered, cycle = order(entries)
    nodes, unmatched = _expand(ordered)
    problems += cycle + unmatched
    for node in nodes:
        problems += _checked(node)
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return Graph(tuple(nodes), values.get("jobs", 1), {name: one for name, one in targets.items() if one})


def _problems_beside_stages(values: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with the top keys of a config other than `stages`."""
    unknown = [key for key in values if key not in ("stages", "jobs", "targets")]
    problems = [f"{key}: unknown key{did_you_mean(str(key), ['stages', 'jobs', 'targets'])}" for key in unknown]
    jobs = values.get("jobs", 1)
    if type(jobs) is not int or jobs < 1:
        problems.append(f"jobs: how many stages may train at once, was {jobs!r}; give a whole number from 1")
    return problems


def _targets(given: object) -> tuple[dict[str, Target | None], list[str]]:
    """Return the other machines by name, None for one whose settings are wrong, and the problems."""
    if given is None:
        return {}, []
    if not isinstance(given, dict):
        return {}, ["targets: give the machines by name, as {orin: {ssh: user@host}}, or {orin: {}} without ssh"]
    found: dict[str, Target | None] = {}
    problems = []
    for name, settings in given.items():
        where = f"targets.{name}"
        found[str(name)] = None
        if set(str(name)) & set("/ ") or str(name).startswith("."):
            problems.append(f"{where}: a target's name may have no space and no slash, nor begin with a dot")
            continue
        try:
            found[str(name)] = Target.model_validate({} if settings is None else settings)
        except ValidationError as error:
            problems += settings_of.problems(error, where, settings)
    return found, problems


def _has_stages(values: Any) -> bool:
    return isinstance(values, dict) and isinstance(values.get("stages"), dict) and bool(values["stages"])


def _entry(name: str, given: object, package: str, targets: Mapping[str, object]) -> tuple[Entry, list[str]]:
    """Return one stage of the config, its settings validated for each combination, and its problems."""
    where = f"stages.{name}"
    if given is not None and not isinstance(given, dict):
        return Entry(name, None), [f"{where}: give its settings as 'setting: value' lines"]
    given = given or {}
    problems = []
    if set(name) & set("[]=,/. ") or not name:
        problems.append(f"{where}: a stage's name may have no space and none of []=,/.")
    settings = {str(key): value for key, value in given.items() if key not in _RESERVED}
    uses = given.get("uses", name)
    try:
        stage = find(package, uses) if isinstance(uses, str) else None
    except UserError as error:
        where = f"{where}.uses" if "uses" in given else f"{where}: say with 'uses' which stage it is"
        return Entry(name, None), [*problems, f"{where}: {error}"]
    if stage is None:
        return Entry(name, None), [*problems, f"{where}.uses: give the name of a stage's file, was {uses!r}"]
    target = given.get("target")
    if target is not None:
        stage, unmovable = _moved(stage, target, targets)
        problems += [f"{where}.target: {problem}" for problem in unmovable]
    entry = Entry(name, stage, given.get("needs"), settings, target="" if target is None else str(target))
    wrong = []
    if "matrix" in given:
        wrong = matrix.problems(given["matrix"], settings, stage.config.model_fields)
        problems += [f"{where}.matrix{place}: {message}" for place, message in wrong]
    axes = given["matrix"] if "matrix" in given and not wrong else {}
    for values in matrix.combinations(axes):
        config, invalid = _validated(where, stage, settings, values)
        entry.configs.append((values, config))
        problems += invalid
    return entry, problems


def _moved(stage: Stage, target: object, targets: Mapping[str, object]) -> tuple[Stage, list[str]]:
    """Return the stage as a target does it, or as it was, and the problems."""
    if target not in targets:
        mend = did_you_mean(str(target), targets) or "; describe it below 'targets:', as {orin: {ssh: user@host}}"
        return stage, [f"no target {target!r}{mend}"]
    try:
        return stage.elsewhere(), []
    except UserError as error:
        return stage, [str(error)]


def _validated(where: str, stage: Stage, settings: dict[str, Any], axes: Axes) -> tuple[BaseConfig | None, list[str]]:
    given = {**settings, **axes}
    try:
        return stage.config.model_validate(given), []
    except UserError as error:  # of a validator that the stage has itself
        lines = [f"{where}: {error}"]
    except ValidationError as error:
        lines = settings_of.problems(error, where, given)
    for axis in axes:
        lines = [line.replace(f"{where}.{axis}", f"{where}.matrix.{axis}", 1) for line in lines]
    return None, lines


def _expand(entries: Iterable[Entry]) -> tuple[list[Node], list[str]]:
    """Make the nodes of every entry, those that feed it already made; return them and what does not match.

    An entry with a problem, or fed by one, gets no nodes: it would only repeat the problem in other words.
    """
    made: dict[str, list[Node]] = {}
    problems: list[str] = []
    for entry in entries:
        made[entry.name] = []
        if entry.stage is None or not entry.whole or not all(made[name] for name in entry.feeding):
            continue
        feeding: dict[str, list[_Choices]] = {}  # slot -> what each of its references may mean
        unmatched = []
        for slot, references in entry.edges.items():
            feeding[slot] = []
            for reference in references:
                nodes = [node for node in made[reference.stage] if reference.selects(node.axes)]
                if not nodes:
                    there = ", ".join(node.name for node in made[reference.stage])
                    unmatched.append(f"stages.{entry.name}.needs.{slot}: no node {reference}; there are: {there}")
                feeding[slot].append([(reference.free(node.axes), node) for node in nodes])
        if not unmatched:
            made[entry.name], unmatched = _fan_out(entry, entry.stage, feeding)
        problems += unmatched
    return [node for nodes in made.values() for node in nodes], problems


def _fan_out(entry: Entry, stage: Stage, feeding: Mapping[str, list[_Choices]]) -> tuple[list[Node], list[str]]:
    """Join the entry's own combinations with those of what feeds it, unless it is gathered, on the axes that they share."""
    gathered = {
        name: tuple(dict.fromkeys(node for choices in feeding.get(name, []) for _, node in choices))
        for name, slot in stage.slots.items()
        if slot.gathers
    }
    empty = {name: () if slot.many else None for name, slot in stage.slots.items()}
    rows: list[_Row] = [(axes, config, {**empty, **gathered}) for axes, config in entry.configs if config is not None]
    for name, slot in stage.slots.items():
        for choices in feeding.get(name, []) if name not in gathered else []:
            joined: list[_Row] = [
                ({**axes, **free}, config, {**inputs, name: (*inputs[name], node) if slot.many else node})
                for axes, config, inputs in rows
                for free, node in choices
                if all(axes[axis] == value for axis, value in free.items() if axis in axes)
            ]
            problem = _left_out(entry, name, rows, joined, choices)
            if problem:
                return [], [problem]
            rows = joined
    nodes = []
    for axes, config, inputs in rows:
        label = matrix.label(entry.name, axes)
        nodes.append(Node(label, stage.name, config, stage.produces, entry.name, axes, stage, inputs, entry.target))
    return nodes, []


def _left_out(entry: Entry, slot: str, before: list[_Row], joined: list[_Row], choices: _Choices) -> str:
    """Return a problem when a combination, or a node that feeds, finds no partner: nothing is dropped in silence."""
    kept = [axes for axes, _, _ in joined]
    lonely = [axes for axes, _, _ in before if not any(axes.items() <= row.items() for row in kept)]
    fed = (inputs[slot] for _, _, inputs in joined)
    used = {id(one[-1] if isinstance(one, tuple) else one) for one in fed}
    unused = [node.name for _, node in choices if id(node) not in used]
    if not lonely and not unused:
        return ""
    names = ", ".join([matrix.label(entry.name, axes) for axes in lonely] + unused)
    return f"stages.{entry.name}.needs.{slot}: {names} have no partner; name one node, or give both the same values"


def _checked(node: Node) -> list[str]:
    """Return the problems that the stage's own `check` finds."""
    wired = {slot: node.feeding(slot) for slot in node.stage.slots}
    return [f"stages.{node.name}: {problem}" for problem in node.stage.check(node.config, wired)]
