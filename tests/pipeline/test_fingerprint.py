"""Layout and comments cost nothing; a changed line of any module that a stage uses is seen."""

import pytest

from pipeline import lookup
from pipeline.fingerprint import Fingerprints


def fingerprint(kitchen, name: str = "knead", package: str = "bakery") -> str:
    kitchen.forget()
    return Fingerprints(["bakery"]).of([lookup.module(package, name)])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("return flour * (1 + WATER)", "return flour * (1 + WATER)  # wet"),
        ("return flour * (1 + WATER)", "return (\n            flour * (1 + WATER)\n        )"),
        ("Salt by weight of flour.", "Salt."),
        ('    """Sour and dark."""\n', ""),
    ],
)
def test_comments_docstrings_and_layout_cost_nothing(kitchen, old: str, new: str) -> None:
    before = fingerprint(kitchen, "rye", "bakery.baking.recipes")
    kitchen.edit("baking/recipes/rye.py", old, new)
    assert fingerprint(kitchen, "rye", "bakery.baking.recipes") == before


@pytest.mark.parametrize(
    ("file", "old", "new", "seen"),
    [
        ("knead.py", "minutes: int = 5", "minutes: int = 6", True),
        ("baking/recipe.py", "def grams(", "def kilos(", True),  # imported by knead
        ("goods/flour.py", '"flour.txt"', '"meal.txt"', True),
        ("baking/water.py", "0.7", "0.8", False),  # imported by a recipe, which only a Choice leads to
        ("bake.py", "RESUMES = True", "RESUMES = False", False),
    ],
)
def test_what_a_module_imports_counts(kitchen, file: str, old: str, new: str, seen: bool) -> None:
    before = fingerprint(kitchen)
    kitchen.edit(file, old, new)
    assert (fingerprint(kitchen) != before) is seen


def test_imports_inside_functions_and_relative_ones_count(kitchen) -> None:
    kitchen.write("bakery/lazy.py", "def f():\n    from .baking import water\n    import bakery.goods.bread\n")
    names = {name for name, _ in Fingerprints(["bakery"]).closure([lookup.module("bakery", "lazy")])}
    expected = {"lazy", "baking", "baking.water", "goods", "goods.bread"}
    assert names == {"bakery"} | {f"bakery.{name}" for name in expected}


def test_the_engine_and_what_only_type_checkers_import_do_not_count(kitchen) -> None:
    source = "from typing import TYPE_CHECKING\nimport pipeline.log, json, pydantic\nif TYPE_CHECKING:\n"
    source += "    import bakery.bake\n"
    kitchen.write("bakery/lazy.py", source)
    names = {name for name, _ in Fingerprints(["bakery"]).closure([lookup.module("bakery", "lazy")])}
    assert names == {"bakery.lazy"}


def test_a_stage_may_name_modules_that_it_reaches_by_computed_names(kitchen) -> None:
    def of() -> str:
        return Fingerprints(["bakery"]).of([lookup.module("bakery", "grind")], ["bakery.baking.recipes.spelt"])

    before = of()
    kitchen.edit("baking/recipes/spelt.py", "1.5", "1.6")
    assert of() != before


def test_two_files_of_the_same_name_both_count(kitchen) -> None:
    files = [kitchen.write(f"{folder}/mine.py", "x = 1") for folder in "ab"]
    before = Fingerprints(["bakery"]).of([lookup.from_path(file) for file in files])
    for file in files:
        file.write_text("x = 2")
        after = Fingerprints(["bakery"]).of([lookup.from_path(file) for file in files])
        assert after != before
        before = after


def test_first_party_is_what_is_not_installed(kitchen) -> None:
    source = "import bakery.baking.water, my_own\n"
    kitchen.write("bakery/lazy.py", source)
    kitchen.write("my_own.py", "x = 1\n")
    names = {name for name, _ in Fingerprints([]).closure([lookup.module("bakery", "lazy")])}
    assert {"my_own", "bakery.baking.water"} <= names
