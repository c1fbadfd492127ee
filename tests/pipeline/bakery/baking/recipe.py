"""Recipe: how dough is made."""

from abc import ABC, abstractmethod


class Recipe(ABC):
    """One way to make dough."""

    @abstractmethod
    def grams(self, flour: int) -> float:
        """Return the weight of the dough."""
