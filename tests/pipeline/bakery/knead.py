"""Knead flour into dough."""

from pathlib import Path

from pydantic import Field

from bakery.baking.diary import note
from bakery.baking.recipe import Recipe
from bakery.goods.dough import Dough
from bakery.goods.flour import Flour
from pipeline.config import BaseConfig, Choice


class Config(BaseConfig):
    """Settings."""

    minutes: int = 5
    """How long."""
    temperature: float = 20.0
    """Of the room, in degrees Celsius."""
    recipe: Choice[Recipe] = Field(default="rye")
    """How the dough is made."""


def run(config: Config, directory: Path, *, flour: Flour, starter: Dough | None = None) -> Dough:
    """Knead."""
    note(f"knead {config.minutes}")
    assert flour.path(flour.file).read_text() == "." * flour.grams
    return Dough(grams=config.recipe.cls().grams(flour.grams) + (starter.grams if starter else 0))
