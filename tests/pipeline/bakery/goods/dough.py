"""Dough."""

from pipeline.artifact import Artifact


class Dough(Artifact):
    """Kneaded flour."""

    grams: float
