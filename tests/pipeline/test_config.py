"""Settings: choices, outside files, and every problem at once."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import Field, ValidationError

from pipeline import lookup
from pipeline.config import BaseConfig, Choice, ExternalFile, ExternalFolder, problems
from pipeline.errors import ConfigError


@pytest.fixture
def config(kitchen) -> Any:
    recipe = lookup.module("bakery.baking", "recipe").Recipe

    class Config(BaseConfig):
        many: dict[str, Choice[recipe]] = Field(default={})  # type: ignore[valid-type]
        row: list[Choice[recipe]] = Field(default=[])  # type: ignore[valid-type]
        one: Choice[recipe] | None = None  # type: ignore[valid-type]
        size: int | tuple[int, int] = 3
        rate: float = 1.0
        grain: ExternalFile | None = None
        field: ExternalFolder | None = None

    return Config


def lines(config: Any, given: dict[str, Any]) -> list[str]:
    with pytest.raises(ValidationError) as caught:
        config.model_validate(given)
    return problems(caught.value, "at", given)


def test_a_choice_is_a_class_and_its_settings(config) -> None:
    made = config.model_validate({"many": {"a": {"name": "rye", "salt": "1e-3"}}, "one": "rye", "row": ["rye"]})
    assert made.many["a"].cls.__name__ == "Rye"
    assert made.many["a"].config.salt == 1e-3
    assert made.one.config.days == 1
    assert made.row[0].module == "bakery.baking.recipes.rye"


def test_a_choice_dumps_what_validates_again(config) -> None:
    made = config.model_validate({"one": {"name": "rye", "days": 3}})
    dumped = made.model_dump(mode="json")["one"]
    assert dumped == {"name": "rye", "salt": 0.02, "days": 3} == made.one.dump()
    assert config.model_validate({"one": dumped}) == made
    assert Choice.parse(lookup.module("bakery.baking", "recipe").Recipe, dumped) == made.one
    assert config(one=made.one) == made


def test_a_choice_by_path(kitchen, config) -> None:
    source = (kitchen.folder / "bakery/baking/recipes/rye.py").read_text()
    kitchen.write("mine.py", source.replace("class Rye", "class Mine"))
    made = config.model_validate({"one": {"name": "./mine.py", "days": 2}})
    assert (made.one.cls.__name__, made.one.config.days) == ("Mine", 2)
    assert made.one.dump()["name"] == "./mine.py"


def test_a_class_without_settings_is_refused(kitchen, config) -> None:
    body = "from bakery.baking.recipe import Recipe\nclass A(Recipe):\n  grams = 1\n"
    kitchen.write("mine.py", body)
    assert "A has no nested `class Config(BaseConfig)`" in lines(config, {"one": "./mine.py"})[0]


def test_parse_raises_every_problem(kitchen) -> None:
    with pytest.raises(ConfigError) as caught:
        Choice.parse(lookup.module("bakery.baking", "recipe").Recipe, {"name": "rye", "salty": 1, "days": "x"})
    assert [line.partition(":")[0] for line in caught.value.problems] == ["recipe.days", "recipe.salty"]


def test_problems_keep_their_place(config) -> None:
    given = {
        "many": {"a": {"name": "rye", "salted": 1, "days": "x"}, "b": "spelt", "c": {"name": "ry"}, "d": 3},
        "row": ["rye", {"name": "rye", "days": None}],
        "size": "big",
        "sise": 1,
        "rate": float("nan"),
    }
    number = "should be a valid integer, unable to parse string as an integer"
    assert lines(config, given) == [
        f"at.many.a.days: {number}, was 'x'",
        "at.many.a.salted: unknown setting; did you mean 'salt'?",
        "at.many.b.honey: needed, but not given",
        "at.many.c.name: no 'ry' in bakery.baking.recipes; did you mean 'rye'?",
        "at.many.d: give a name, or {name: ..., and its settings}; there are: rye, spelt",
        "at.row[1].days: should be a valid integer",
        f"at.size: {number}, was 'big', or should be a valid tuple, was 'big'",
        "at.rate: should be a finite number, was nan",
        "at.sise: unknown setting; did you mean 'size'?",
    ]


def test_outside_files_must_exist(kitchen, config) -> None:
    kitchen.write("barn/rye.txt", "rye")
    made = config.model_validate({"grain": "barn/rye.txt", "field": "barn"})
    assert made.grain.path == kitchen.folder / "barn/rye.txt"
    assert Path(made.grain).read_text() == "rye"
    assert made.model_dump(mode="json")["grain"] == "barn/rye.txt"
    assert lines(config, {"grain": "barn/ry.txt"}) == ["at.grain: no file barn/ry.txt; did you mean 'rye.txt'?"]
    assert lines(config, {"grain": "bran/rye.txt"}) == ["at.grain: no file bran/rye.txt; did you mean 'barn'?"]
    assert lines(config, {"grain": "barn", "field": "barn/rye.txt", "rate": "x"})[:2] == [
        "at.rate: should be a valid number, unable to parse string as a number, was 'x'",
        "at.grain: no file barn; it is a folder",
    ]


def test_settings_are_frozen_and_described(config) -> None:
    with pytest.raises(ValidationError):
        config().rate = 2.0
    rye = lookup.module("bakery.baking.recipes", "rye").Rye
    assert rye.Config.model_fields["salt"].description == "Salt by weight of flour."
