"""Spelt."""

from bakery.baking.recipe import Recipe
from pipeline.config import BaseConfig


class Spelt(Recipe):
    """Nutty."""

    class Config(BaseConfig):
        """Settings of spelt."""

        honey: float
        """Grams of honey."""

    def grams(self, flour: int) -> float:
        """Return the weight of the dough."""
        return flour * 1.5
