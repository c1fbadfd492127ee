"""Bread."""

from pipeline.artifact import Artifact


class Bread(Artifact):
    """Baked dough."""

    loaves: int


class SweetBread(Bread):
    """Bread with raisins: fits wherever bread does."""
