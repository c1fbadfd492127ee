"""Fingerprint: what code a stage is, so that a changed loss makes new results and a changed comment does not.

It is a hash over syntax trees, without comments, docstrings and layout, of the stage's module, of the modules its
choices come from, and of every first-party module that any of these import, transitively, anywhere in the file.
First-party is what lies outside the standard library and `site-packages`, and the packages given by name, wherever they
are installed. The engine itself, `pipeline`, is left out: what it does to a result is in the key already, and a
refactoring of it must not retrain. Modules reached only by a computed name are not seen, unless a `Choice` of the
settings leads to them or the stage names them in `CODE`.
"""

import ast
import importlib.util
import sys
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from types import ModuleType


class Fingerprints:
    """The fingerprints of modules; every file is read once in its lifetime."""

    def __init__(self, packages: Sequence[str]) -> None:
        """Take the names of the packages that are first-party even when they are installed."""
        self._packages = packages
        self._files: dict[Path, tuple[str, frozenset[tuple[str, Path]]]] = {}
        self._tops: dict[str, Path | None] = {}

    def of(self, modules: Iterable[ModuleType], names: Iterable[str] = ()) -> str:
        """Return the fingerprint of modules, loaded or just named, and of all first-party code that they import."""
        lines = sorted(f"{name} {self._file(name, path)[0]}" for name, path in self.closure(modules, names))
        return sha256("\n".join(lines).encode()).hexdigest()

    def closure(self, modules: Iterable[ModuleType], names: Iterable[str] = ()) -> set[tuple[str, Path]]:
        """Return the name and file of each module of the closure; a user's own file goes by its file name."""
        found: set[tuple[str, Path]] = set()
        waiting = [(_name(module), Path(module.__file__)) for module in modules if module.__file__]
        waiting += [module for name in names for module in self._resolve(name)]
        while waiting:
            module = waiting.pop()
            if module not in found:
                found.add(module)
                waiting += self._file(*module)[1]
        return found

    def _file(self, name: str, path: Path) -> tuple[str, frozenset[tuple[str, Path]]]:
        """Return a file's digest and the first-party modules that it imports."""
        if path not in self._files:
            tree = ast.parse(path.read_bytes(), str(path))
            imported = {module for wanted in _imports(tree, name, path) for module in self._resolve(wanted)}
            digest = sha256(ast.dump(_Bare().visit(tree)).encode()).hexdigest()
            self._files[path] = digest, frozenset(imported)
        return self._files[path]

    def _resolve(self, wanted: str) -> Iterator[tuple[str, Path]]:
        """Yield the packages' and the module's files on the way to a dotted name, as far as it is modules."""
        parts = wanted.split(".")
        place = self._top(parts[0])
        for i in range(len(parts)):
            if place is None:
                return
            name = ".".join(parts[: i + 1])
            if place.is_dir():
                if (place / "__init__.py").is_file():
                    yield name, place / "__init__.py"
                below = place / parts[i + 1] if i + 1 < len(parts) else None
                place = next((p for p in (below, below.with_suffix(".py")) if p.exists()), None) if below else None
            else:
                yield name, place
                return

    def _top(self, name: str) -> Path | None:
        """Return the folder or file of a top-level module if it is first-party; nothing is imported."""
        if name not in self._tops:
            self._tops[name] = None
            if name not in sys.stdlib_module_names and name != "pipeline":
                spec = importlib.util.find_spec(name)
                folders = list(spec.submodule_search_locations or []) if spec else []
                file = folders[0] if folders else spec.origin if spec else None
                if file and (name in self._packages or not {"site-packages", "dist-packages"} & set(Path(file).parts)):
                    self._tops[name] = Path(file) if folders or file.endswith(".py") else None
        return self._tops[name]


def _name(module: ModuleType) -> str:
    return Path(str(module.__file__)).name if module.__name__.startswith("user_file_") else module.__name__


def _imports(tree: ast.AST, name: str, path: Path) -> Iterator[str]:
    """Yield the dotted names that a module imports, anywhere in it; `from a import b` gives `a.b`."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*start, *([node.module] if node.module else [])])
            yield from (f"{prefix}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            waiting += node.orelse  # imported by type checkers only
        else:
            waiting += ast.iter_child_nodes(node)


class _Bare(ast.NodeTransformer):
    """Drops strings that are statements: docstrings, and the descriptions of settings."""

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        body = getattr(node, "body", None)
        if isinstance(body, list) and not body:
            node.body = [ast.Pass()]  # type: ignore[attr-defined]  # it has one, by the line above
        return node

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:  # the name ast looks for
        if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            return None
        return self.generic_visit(node)
