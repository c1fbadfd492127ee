"""Sell what was praised."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from bakery.baking.diary import note
from bakery.goods.bread import Bread
from bakery.goods.verdict import Receipt, Verdict
from pipeline.config import BaseConfig
from pipeline.stage import NodeView


class Config(BaseConfig):
    """Settings."""

    till: str = "left"
    """Which till."""


def check(config: Config, wired: Mapping[str, Sequence[NodeView]]) -> Iterator[str]:
    """Refuse to sell from one till what another gives."""
    if config.till == "none" and wired["breads"]:
        yield f"no till for {wired['breads'][0].name}, a {wired['breads'][0].produces.__name__}; open one"


def identity(config: Config) -> dict[str, str]:
    """Return the till that is used."""
    return {"till": Path("till.txt").read_text() if Path("till.txt").exists() else config.till}


def run(config: Config, directory: Path, *, verdict: Verdict, breads: list[Bread]) -> Receipt:
    """Sell."""
    note("sell")
    return Receipt(total=sum(bread.loaves for bread in breads))
