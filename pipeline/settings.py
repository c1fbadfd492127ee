"""Settings as `pipeline stages` lists them: every one with its type, its default and its meaning."""

import json
import textwrap
import types
from collections.abc import Iterator
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined, to_jsonable_python

from pipeline import lookup
from pipeline.config import BaseConfig, Choice
from pipeline.stage import find
from pipeline.target import Target

_WIDTH = 118


def stage_lines(package: str, name: str) -> Iterator[str]:
    """Yield the description of one stage: what it does, takes, gives, and its settings.

    Raises UserError when there is no such stage.
    """
    stage = find(package, name)
    yield f"{stage.name}: {stage.summary}"
    for slot in stage.slots.values():
        yield f"  takes  {slot.name}: {slot}"
    yield f"  gives  {stage.produces.__name__}"
    if stage.portable:
        yield f"  target  another machine can do it, of {', '.join(stage.elsewhere().slots) or 'nothing'}"
    yield from _settings(stage.config, "  ")
    yield ""


def target_lines() -> Iterator[str]:
    """Yield the settings of a machine below `targets:`."""
    yield "targets: The other machines, by the names that the `target` of a stage may have."
    yield from _settings(Target, "  ")


def _settings(config: type[BaseConfig], indent: str) -> Iterator[str]:
    for name, field in config.model_fields.items():
        nested = _models(field.annotation)
        given = "  (needed)" if field.is_required() else "" if nested else f" = {_default(field)}"
        yield f"{indent}{name}: {_type(field.annotation)}{_limits(field.metadata)}{given}"
        if field.description:
            inner = f"{indent}    "
            yield from textwrap.wrap(field.description, _WIDTH, initial_indent=inner, subsequent_indent=inner)
        for model in nested:
            yield from _settings(model, f"{indent}  ")
        for kind in _kinds(field.annotation):
            yield from _choices(kind, f"{indent}  ")


def _choices(kind: type, indent: str) -> Iterator[str]:
    package = f"{kind.__module__}s"
    for name in lookup.names(package):
        cls = lookup.subclass(lookup.module(package, name), kind)
        summary = (cls.__doc__ or "").strip().partition("\n")[0]
        yield f"{indent}{name}: {summary}"
        yield from _settings(cls.Config, f"{indent}  ")


def _default(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True, validated_data={})
    if default is PydanticUndefined:
        return ""
    if isinstance(default, Choice):
        return str(default.name)
    return json.dumps(to_jsonable_python(default, fallback=str))


def _parts(annotation: Any) -> Iterator[Any]:
    """Yield an annotation and all that it is made of, not going into choices."""
    yield annotation
    if get_origin(annotation) is not Choice:
        for part in get_args(annotation):
            yield from _parts(part)


def _models(annotation: Any) -> list[type[BaseConfig]]:
    return [part for part in _parts(annotation) if isinstance(part, type) and issubclass(part, BaseConfig)]


def _kinds(annotation: Any) -> list[type]:
    return [get_args(part)[0] for part in _parts(annotation) if get_origin(part) is Choice]


def _limits(metadata: list[Any]) -> str:
    """Return the limits of a number as ` (> 0, <= 4)`, or nothing."""
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    given = ((sign, getattr(item, name, None)) for item in metadata for name, sign in signs.items())
    found = [f"{sign} {limit}" for sign, limit in given if limit is not None]
    return f" ({', '.join(found)})" if found else ""


def _type(annotation: Any) -> str:
    """Return a type as YAML's writer thinks of it."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Choice:
        return f"one of {', '.join(lookup.names(f'{arguments[0].__module__}s'))}, or a path"
    if origin is Annotated:
        return _type(arguments[0]) + _limits(arguments[1].metadata if isinstance(arguments[1], FieldInfo) else [])
    if isinstance(annotation, type) and issubclass(annotation, BaseConfig):
        return "settings"
    if origin in (Union, types.UnionType):
        return " or ".join(_type(part) for part in arguments)
    if annotation is type(None):
        return "null"
    if origin is not None and isinstance(origin, type):
        inner = ", ".join("..." if part is Ellipsis else _type(part) for part in arguments)
        return f"{origin.__name__}[{inner}]"
    if origin is not None:  # Literal
        return " or ".join(map(repr, arguments))
    return getattr(annotation, "__name__", str(annotation))
