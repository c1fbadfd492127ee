"""A config file as plain values: YAML 1.2 scalars, equal keys refused with their lines, `--set` applied.

PyYAML reads YAML 1.1, in which `on` is a boolean, `1:30` a number, `010` eight, `1e-3` a string, and of two equal keys
the last wins without a word. Here scalars are those of YAML 1.2's core schema.
"""

import re
from collections.abc import Hashable, Sequence
from typing import Any

import yaml

from pipeline.errors import ConfigError, did_you_mean

_FLOAT = r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
_SCALARS = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", _FLOAT, "-+.0123456789"),
    ("merge", r"<<", "<"),
)


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 scalars, which notes equal keys instead of dropping one."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.problems: list[str] = []

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                self.problems.append(f"line {line}: a key must be a plain word")
                continue
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                first = seen[key.value]
                self.problems.append(f"line {line}: '{key.value}' is given twice, first in line {first}; keep one")
            seen.setdefault(key.value, line)
        node.value = [pair for pair in node.value if isinstance(pair[0], yaml.ScalarNode)]
        return super().construct_mapping(node, deep=deep)


def _integer(loader: Any, node: Any) -> int:
    text = loader.construct_scalar(node)
    return int(text, 0) if text.startswith(("0o", "0x")) else int(text)


_Loader.yaml_implicit_resolvers = {}  # none of YAML 1.1's
for _tag, _pattern, _first in _SCALARS:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))
_Loader.yaml_implicit_resolvers.setdefault("", []).append(("tag:yaml.org,2002:null", re.compile("^$")))
_Loader.add_constructor("tag:yaml.org,2002:int", _integer)


def parse(text: str, where: str) -> tuple[Any, list[str]]:
    """Return the values of a YAML text and its problems, one line each beginning with `where`.

    Raises ConfigError when it is not YAML at all.
    """
    try:
        loader = _Loader(text)
        values = loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f" line {mark.line + 1}, column {mark.column + 1}:" if mark else ""
        raise ConfigError([f"{where}:{line} not valid YAML: {error.problem or error.context}"]) from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError([f"{where}: not valid YAML: {' '.join(str(error).split())}"]) from None
    problems = [f"{where}: {problem}" for problem in loader.problems]
    try:
        return _unshared(values), problems
    except RecursionError:
        raise ConfigError([*problems, f"{where}: an alias stands inside what it stands for; write it out"]) from None


def _unshared(value: Any) -> Any:
    """Return the same values without sharing: PyYAML gives every alias one object, and `--set` must change one place."""
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    return [_unshared(item) for item in value] if isinstance(value, list) else value


def override(values: dict[str, Any], settings: Sequence[str]) -> list[str]:
    """Apply `a.b.c=value` settings in place, each value read as YAML; return the problems.

    All but the last name must exist. A name that stands for a class, as in `detector: retinanet`, opens into
    `{name: retinanet}` when one of its settings is given.
    """
    problems = []
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals:
            problems.append(f"--set {setting}: give a setting as stages.NAME.SETTING=VALUE")
            continue
        try:
            value, wrong = parse(text, f"--set {setting}")
        except ConfigError as error:
            problems += error.problems
            continue
        problems += wrong or _put(values, path.split("."), value, setting)
    return problems


def _put(values: Any, names: list[str], value: Any, setting: str) -> list[str]:
    here = values
    for i, name in enumerate(names):
        place: Any = int(name) if isinstance(here, list) and name.isdecimal() and int(name) < len(here) else name
        if i == len(names) - 1 and (isinstance(here, dict) or place is not name):
            here[place] = value
            break
        known = here if isinstance(here, dict) else {}
        if place is name and name not in known:
            mend = did_you_mean(name, map(str, known))
            return [f"--set {setting}: {'.'.join(names[:i]) or 'the config'} has no '{name}'{mend}"]
        if here[place] is None:
            here[place] = {}
        elif isinstance(here[place], str):
            here[place] = {"name": here[place]}
        here = here[place]
    return []
