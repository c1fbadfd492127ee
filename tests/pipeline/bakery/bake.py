"""Bake dough into loaves, one after another; a killed run goes on with the next loaf."""

import errno
import time
from pathlib import Path

from bakery.baking.diary import note
from bakery.goods.bread import Bread
from bakery.goods.dough import Dough
from pipeline.config import BaseConfig
from pipeline.errors import UserError, VerdictError
from pipeline.log import logger, progress

RESUMES = True


class Config(BaseConfig):
    """Settings."""

    loaves: int = 2
    """How many."""
    seconds: float = 0.0
    """A loaf takes."""
    trouble: str = ""
    """What goes wrong after the first loaf."""


def run(config: Config, directory: Path, *, dough: Dough) -> Bread:
    """Bake."""
    note(f"bake {config.loaves}")
    logger.info("the oven is hot")
    with progress("bake", total=config.loaves, unit="loaf") as advance:
        for i in range(config.loaves):
            loaf = directory / f"loaf-{i}.txt"
            if not loaf.exists():
                time.sleep(config.seconds)
                note(f"loaf {i}")
                loaf.write_text(f"{dough.grams / config.loaves}\n")
            advance(1, grams=dough.grams)
            _trouble(config.trouble)
    return Bread(loaves=config.loaves)


def _trouble(what: str) -> None:
    if what == "data":
        raise UserError("grain: mouldy; buy another")
    if what == "proof":
        raise VerdictError("the loaf is raw")
    if what == "bug":
        raise ZeroDivisionError("oops")
    if what == "disk":
        raise OSError(errno.ENOSPC, "No space left on device", "loaf.txt")
