"""Rye."""

from bakery.baking.recipe import Recipe
from bakery.baking.water import WATER
from pipeline.config import BaseConfig


class Rye(Recipe):
    """Sour and dark."""

    class Config(BaseConfig):
        """Settings of rye."""

        salt: float = 0.02
        """Salt by weight of flour."""
        days: int = 1
        """Days of souring."""

    def grams(self, flour: int) -> float:
        """Return the weight of the dough."""
        return flour * (1 + WATER)
