"""Grind grain into flour."""

from pathlib import Path

from pydantic import Field

from bakery.baking.diary import note
from bakery.goods.flour import Flour
from pipeline.config import BaseConfig, ExternalFile, ExternalFolder


class Config(BaseConfig):
    """Settings."""

    grams: int = Field(default=100, gt=0)
    """How much flour."""
    grain: ExternalFile | None = None
    """A file of grain to grind."""
    field: ExternalFolder | None = None
    """A folder of grain."""


def run(config: Config, directory: Path) -> Flour:
    """Grind."""
    note("grind")
    (directory / "flour.txt").write_text("." * config.grams)
    return Flour(grams=config.grams)
