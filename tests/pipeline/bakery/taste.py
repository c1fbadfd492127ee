"""Taste all bread there is."""

from pathlib import Path

from bakery.baking.diary import note
from bakery.goods.bread import Bread
from bakery.goods.verdict import Verdict
from pipeline.config import BaseConfig


class Config(BaseConfig):
    """Settings."""

    min_loaves: int = 0
    """A gate: what has fewer loaves fails."""


def run(config: Config, directory: Path, *, breads: list[Bread]) -> Verdict:
    """Taste."""
    note("taste")
    lines = [f"{bread.name} {bread.loaves} {len(bread.key)}" for bread in breads]
    (directory / "summary.txt").write_text("\n".join(lines) + "\n")
    failed = [bread.name for bread in breads if bread.loaves < config.min_loaves]
    return Verdict(tasted=tuple(b.name for b in breads), failures=tuple(f"{name} has too few" for name in failed))
