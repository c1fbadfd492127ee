"""What tasting and selling give."""

from pipeline.artifact import Artifact


class Verdict(Artifact):
    """What the tasters said, by the name of what they tasted."""

    tasted: tuple[str, ...]


class Receipt(Artifact):
    """What was sold."""

    total: int
