"""A name is a file: `retinanet` is the module `retinanet.py` of a package, `./mine.py` is a user's own file.

There is no registry. Listing names imports nothing but the package itself, whose `__init__.py` is empty.
"""

import importlib
import importlib.util
import inspect
import pkgutil
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import TypeVar, cast

from pipeline.errors import UserError, did_you_mean

T = TypeVar("T")


def names(package: str) -> list[str]:
    """Return the names of the modules directly in a package, sorted; folders and names with a leading _ are left out.

    Raises ModuleNotFoundError when there is no such package.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError(f"{package}: not a package", name=package)
    found = pkgutil.iter_modules(spec.submodule_search_locations)
    return sorted(item.name for item in found if not item.ispkg and not item.name.startswith("_"))


def module(package: str, name: str) -> ModuleType:
    """Import the module `name` of a package.

    Raises UserError, with a close name when there is one, if the package has no such file.
    """
    known = names(package)
    if name not in known:
        raise UserError(f"no '{name}' in {package}{did_you_mean(name, known)}")
    return importlib.import_module(f"{package}.{name}")


def is_path(name: str) -> bool:
    """Return whether a name in YAML is a path to a file rather than the name of one of ours."""
    return name.endswith(".py") or "/" in name


def from_path(path: str | Path) -> ModuleType:
    """Import a user's own file, once a process; a relative path starts at the current folder.

    Raises UserError when there is no such file or importing it fails, naming the line.
    """
    file = Path(path).expanduser().absolute()
    if not file.is_file():
        near = sorted(p.name for p in file.parent.glob("*.py")) if file.parent.is_dir() else []
        raise UserError(f"no file {path}{did_you_mean(file.name, near)}")
    name = f"user_file_{file.stem}_{sha256(str(file).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is not a Python file; a name ends in .py")
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[name] = loaded  # before it runs: dataclasses and pydantic look their module up
    try:
        spec.loader.exec_module(loaded)
    except Exception as error:
        del sys.modules[name]
        raise UserError(f"{path} cannot be imported: {type(error).__name__}: {error}{_line(error, file)}") from error
    return loaded


def _line(error: BaseException, file: Path) -> str:
    """Return ` (line N)`: the last line of the file that the traceback goes through."""
    lines, trace = [], error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(file):
            lines.append(trace.tb_lineno)
        trace = trace.tb_next
    return f" (line {lines[-1]})" if lines else ""


def subclass(module: ModuleType, kind: Callable[..., T]) -> type[T]:
    """Return the one concrete subclass of the class `kind` that a module defines itself.

    `kind` is typed as a callable so that an abstract class may be given. Raises UserError when there is none or more.
    """
    if not isinstance(kind, type):
        raise TypeError(f"subclass: {kind!r} is not a class")
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, kind)
        and value is not kind
        and value.__module__ == module.__name__
        and not inspect.isabstract(value)
    ]
    if len(found) != 1:
        given = ", ".join(sorted(value.__name__ for value in found)) or "none"
        raise UserError(f"{module.__file__} must define exactly one concrete {kind.__name__}, it defines: {given}")
    return cast("type[T]", found[0])
