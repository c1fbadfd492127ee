"""Settings: what a YAML file may say, as frozen pydantic models whose problems are all reported at once.

`BaseConfig` is the parent of every `Config`. `Choice[T]` is a setting that picks a class by file name and carries that
class's own settings. `ExternalFile` and `ExternalFolder` are paths outside the store.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final, Generic, Self, TypeVar, cast, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    GetCoreSchemaHandler,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError, core_schema

from pipeline import lookup
from pipeline.errors import ConfigError, UserError, did_you_mean

T = TypeVar("T")


class BaseConfig(BaseModel):
    """Settings of a stage or of a chosen class; a string under a field is its description in `pipeline stages`."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )

    @model_validator(mode="wrap")
    @classmethod
    def _name_unknown_settings(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Say of an unknown setting which known one is close: pydantic's own message does not know the others."""
        try:
            return handler(value)
        except ValidationError as error:
            details = [_detail(item, cls.model_fields) for item in error.errors(include_url=False)]
            raise ValidationError.from_exception_data(error.title, details) from None


def _detail(item: Any, fields: Mapping[str, Any]) -> InitErrorDetails:
    message, loc = item["msg"], item["loc"]
    if item["type"] == "extra_forbidden" and len(loc) == 1:
        message = f"unknown setting{did_you_mean(str(loc[0]), fields)}"
        item["type"] = "unknown_setting"
    return {"type": PydanticCustomError(item["type"], message), "loc": loc, "input": item["input"]}


class Choice(Generic[T]):
    """A class picked by a name in YAML, with its settings: `{name: pkd, weight: 6.0}`, or just `pkd`.

    If `T` is defined in the module `a.b.thing`, the name is a file of the package `a.b.things`, or a path to a user's
    file. Either has one concrete subclass of `T`, with a nested `Config(BaseConfig)`. It is imported when validated.
    """

    # Not a dataclass: pydantic would validate its fields instead of asking it.
    def __init__(self, name: str, cls: type[T], config: Any) -> None:
        """Take what `_chosen` found: the name as given, the class, and an instance of the class's `Config`."""
        self.name: Final = name
        self.cls: Final = cls
        self.config: Final = config

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Choice) and (self.cls, self.config) == (other.cls, other.config)

    def __hash__(self) -> int:
        return hash(self.cls)

    def __repr__(self) -> str:
        return f"Choice({self.name!r}, {self.cls.__name__}, {self.config!r})"

    @property
    def module(self) -> str:
        """The name of the module that defines the class, whose code is part of the stage's fingerprint."""
        return self.cls.__module__

    def dump(self) -> dict[str, Any]:
        """Return name and settings, defaults included, as JSON values that `Choice.parse` takes."""
        return {"name": self.name, **self.config.model_dump(mode="json")}

    @staticmethod
    def parse(kind: Callable[..., T], value: object) -> "Choice[T]":
        """Make the choice that a dumped dict, or a name, describes.

        `kind` is the class `T`, abstract as it may be. Raises ConfigError with every problem.
        """
        try:
            return _chosen(kind, value)
        except ValidationError as error:
            where = kind.__name__.lower() if isinstance(kind, type) else "choice"
            raise ConfigError(problems(error, where, value)) from None

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        """Validate as `_chosen` for the class in the brackets, serialise as `dump`."""
        arguments = get_args(source)
        if not arguments:
            raise TypeError("Choice needs the class it chooses from: Choice[Detector]")
        return core_schema.no_info_plain_validator_function(
            partial(_chosen, arguments[0]),
            serialization=core_schema.plain_serializer_function_ser_schema(lambda choice: choice.dump()),
        )


def _chosen(kind: Callable[..., T], value: object) -> Choice[T]:
    """Return the choice a YAML value makes; ValidationErrors raised here keep their place inside an outer model."""
    if not isinstance(kind, type):
        raise TypeError(f"Choice: {kind!r} is not a class")
    if isinstance(value, Choice) and issubclass(value.cls, kind):
        return cast("Choice[T]", value)
    package = f"{kind.__module__}s"
    settings = {"name": value} if isinstance(value, str) else value
    if not isinstance(settings, Mapping) or not isinstance(settings.get("name"), str):
        known = ", ".join(lookup.names(package))
        raise _problem(kind, value, (), f"give a name, or {{name: ..., and its settings}}; there are: {known}")
    name = settings["name"]
    try:
        found = lookup.from_path(name) if lookup.is_path(name) else lookup.module(package, name)
        chosen = lookup.subclass(found, kind)
    except UserError as error:
        raise _problem(kind, value, () if isinstance(value, str) else ("name",), str(error)) from error
    config = getattr(chosen, "Config", None)
    if not (isinstance(config, type) and issubclass(config, BaseConfig)):
        message = f"{found.__file__}: {chosen.__name__} has no nested `class Config(BaseConfig)`"
        raise _problem(kind, value, (), message)
    return Choice(name, chosen, config.model_validate({k: v for k, v in settings.items() if k != "name"}))


def _problem(kind: type, value: object, loc: tuple[str, ...], message: str) -> ValidationError:
    detail: InitErrorDetails = {"type": PydanticCustomError("choice", cast(Any, message)), "loc": loc, "input": value}
    return ValidationError.from_exception_data(kind.__name__, [detail])


class _External(os.PathLike[str]):
    """A path given in YAML, relative to the current folder, that must exist when the config is read."""

    what = "file or folder"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Raise ValueError when nothing of the right sort is there, naming what is close."""
        self.given = os.fspath(path)
        self.path = Path(os.path.abspath(os.path.expanduser(self.given)))
        if not self._exists():
            raise ValueError(f"no {self.what} {self.given}{self._nearest()}")

    def _exists(self) -> bool:
        return self.path.exists()

    def _nearest(self) -> str:
        """Walk up to the first folder that exists and say what there is instead."""
        if self.path.exists():
            return "; it is a folder" if self.path.is_dir() else "; it is a file"
        missing = self.path
        while not missing.parent.is_dir():
            missing = missing.parent
        there = sorted(entry.name for entry in missing.parent.iterdir())
        close = did_you_mean(missing.name, there)
        if close.startswith("; did"):
            return close
        return f"; {os.path.relpath(missing.parent)} has no {missing.name}" if missing != self.path else ""

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return self.given

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.given!r})"

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.path == self.path

    def __hash__(self) -> int:
        return hash(self.path)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        """Validate a path or one of these, serialise as the path that was given."""

        def validate(value: Any) -> Any:
            if not isinstance(value, str | os.PathLike):
                raise ValueError(f"give the path of a {cls.what}")
            return value if type(value) is cls else cls(value)

        return core_schema.no_info_plain_validator_function(
            validate, serialization=core_schema.plain_serializer_function_ser_schema(str)
        )


class ExternalFile(_External):
    """A file outside the store; its content, not its path, is part of the key of what is made from it."""

    what = "file"

    def _exists(self) -> bool:
        return self.path.is_file()


class ExternalFolder(_External):
    """A folder outside the store; names, sizes and times of the files below it are part of the key."""

    what = "folder"

    def _exists(self) -> bool:
        return self.path.is_dir()


def at_default(settings: object, where: str = "") -> Iterator[str]:
    """Yield the dotted names, each after `where`, of the settings that stand at their defaults, in choices too."""
    value = settings.config if isinstance(settings, Choice) else settings
    if isinstance(value, BaseModel):
        for name, field in type(value).model_fields.items():
            item = getattr(value, name)
            default = field.get_default(call_default_factory=True, validated_data={})
            if name not in value.model_fields_set or item == default:
                yield f"{where}{name}"
            yield from at_default(item, f"{where}{name}.")
    elif isinstance(value, Mapping | list | tuple):
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from at_default(item, f"{where}{key}.")


def problems(error: ValidationError, where: str, given: object) -> list[str]:
    """Return one line a problem, `where.setting: what is wrong`, in pydantic's order.

    `given` is what was validated: it tells the keys of a location from the tags pydantic adds for unions.
    """
    lines: dict[str, list[str]] = {}
    for item in error.errors(include_url=False):
        messages = lines.setdefault(where + _location(item, given), [])
        message = _message(item)
        if message not in messages:
            messages.append(message)
    return [f"{place}: {', or '.join(messages)}" for place, messages in lines.items()]


def _location(item: Any, given: object) -> str:
    text, here = "", given
    for i, part in enumerate(item["loc"]):
        last = i == len(item["loc"]) - 1
        if isinstance(here, Mapping) and part in here:
            here, text = here[part], f"{text}.{part}"
        elif isinstance(here, list | tuple) and isinstance(part, int) and part < len(here):
            here, text = here[part], f"{text}[{part}]"
        elif last and item["type"] in ("missing", "unknown_setting"):
            text = f"{text}.{part}"
    return text


def _message(item: Any) -> str:
    if item["type"] == "missing":
        return "needed, but not given"
    message = str(item["msg"]).removeprefix("Value error, ").removeprefix("Input ")
    value = item["input"]
    shown = item["type"] not in ("unknown_setting", "choice", "value_error") and isinstance(value, str | int | float)
    return message + (f", was {value!r}" if shown else "")
