"""A name is a file, a path is a user's file."""

import sys
from pathlib import Path

import pytest

from pipeline import lookup
from pipeline.errors import UserError


@pytest.fixture
def recipe(kitchen) -> type:
    return lookup.module("bakery.baking", "recipe").Recipe


def test_names_are_files_and_nothing_is_imported(kitchen) -> None:
    assert lookup.names("bakery.baking.recipes") == ["rye", "spelt"]
    assert "bakery.baking.recipes.rye" not in sys.modules
    assert lookup.names("bakery") == ["bake", "grind", "knead", "sell", "taste"]  # folders are no stages


def test_no_such_package() -> None:
    with pytest.raises(ModuleNotFoundError):
        lookup.names("pipeline.nothing")


def test_unknown_name_says_what_is_close(kitchen) -> None:
    with pytest.raises(UserError, match=r"no 'ryee' in bakery.baking.recipes; did you mean 'rye'\?"):
        lookup.module("bakery.baking.recipes", "ryee")
    with pytest.raises(UserError, match="there are: rye, spelt"):
        lookup.module("bakery.baking.recipes", "xyz")


def test_the_one_concrete_subclass(kitchen, recipe) -> None:
    assert lookup.subclass(lookup.module("bakery.baking.recipes", "rye"), recipe).__name__ == "Rye"


@pytest.mark.parametrize("body", ["", "class A(Recipe):\n  grams = 1\nclass B(Recipe):\n  grams = 1\n"])
def test_none_or_two_subclasses_are_refused(kitchen, recipe, body: str) -> None:
    path = kitchen.write("mine.py", f"from bakery.baking.recipe import Recipe\n{body}")
    with pytest.raises(UserError, match="exactly one concrete Recipe, it defines: " + ("A, B" if body else "none")):
        lookup.subclass(lookup.from_path(path), recipe)


def test_a_file_is_imported_once(kitchen) -> None:
    path = kitchen.write("mine.py", "x = []")
    assert lookup.from_path("./mine.py") is lookup.from_path(Path(path))


def test_problems_of_a_file_are_named(kitchen) -> None:
    kitchen.write("mine.py", "x = 1\ny = 1 / 0\n")
    with pytest.raises(UserError, match=r"mine.py cannot be imported: ZeroDivisionError.*line 2"):
        lookup.from_path("mine.py")
    with pytest.raises(UserError, match=r"no file ./mime.py; did you mean 'mine.py'"):
        lookup.from_path("./mime.py")
