"""How much water."""

WATER = 0.7
