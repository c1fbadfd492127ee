"""Flour."""

from pipeline.artifact import Artifact


class Flour(Artifact):
    """Ground grain."""

    grams: int
    file: str = "flour.txt"
