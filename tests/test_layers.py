"""What the import contracts in pyproject.toml cannot say: what may be imported when a module is imported.

A device has no training framework and pays for every import; `pipeline --help` must not wait for torch. So the engine
and the runtime import only a few packages at module level. The contracts themselves are checked by `lint-imports`.
"""

import ast
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {
    "deploy": {"deploy", "numpy", "PIL"},
    "pipeline": {"pipeline", "click", "pydantic", "pydantic_core", "rich", "yaml"},
}


def imported(body: list[ast.stmt]) -> Iterator[str]:
    """Top-level packages that these statements import as soon as they run; bodies of functions do not."""
    for statement in body:
        if isinstance(statement, ast.Import):
            yield from (alias.name.split(".")[0] for alias in statement.names)
        elif isinstance(statement, ast.ImportFrom):
            yield (statement.module or "").split(".")[0]
        elif isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test):
            yield from imported(statement.orelse)
        elif not isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for field in ("body", "orelse", "finalbody"):
                yield from imported(getattr(statement, field, []))


def test_no_stage_and_no_library_imports_a_stage():
    """A file in stages/ is a stage; what stages share is a folder. A new stage is covered as soon as it is there."""
    stages = {f"stages.{file.stem}" for file in (ROOT / "stages").glob("*.py")} - {"stages.__init__"}
    assert len(stages) > 5
    nodes = [
        (file, node)
        for file in sorted((ROOT / "stages").rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, (ast.Import, ast.ImportFrom))
    ]
    found = {
        f"{file.relative_to(ROOT)} imports {name}"
        for file, node in nodes
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        )
        if name in stages
    }
    assert found == set()


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_nothing_heavy_is_imported_with_a_module(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert len(files) > 10
    allowed = ALLOWED[package] | sys.stdlib_module_names
    found = {
        f"{file.relative_to(ROOT)}: {name}" for file in files for name in imported(ast.parse(file.read_text()).body)
    }
    assert {line for line in found if line.split(": ")[1] not in allowed} == set()


def test_heavy_imports_are_seen_where_they_would_hurt():
    """The test above can fail: at module level, in a class, in a try; not in a function, not for type checkers."""
    source = """
import torch
class A:
    import onnx
try:
    from scipy.special import erf
except ImportError:
    pass
if TYPE_CHECKING:
    import pandas
def f():
    import sklearn
"""
    assert set(imported(ast.parse(source).body)) == {"torch", "onnx", "scipy"}


def test_packages_with_code_are_installed():
    """A package that pyproject.toml does not list works in a checkout and lacks in a wheel."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {file.parent for root in ("pipeline", "deploy", "stages") for file in (ROOT / root).rglob("*.py")}
    assert sorted(listed) == sorted(str(folder.relative_to(ROOT)).replace("/", ".") for folder in folders)
