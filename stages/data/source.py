"""Source: where a dataset comes from. It leaves a folder of images and a COCO JSON for each split, not yet checked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import BaseConfig


@dataclass(frozen=True)
class RawSplit:
    """Absolute paths: the folder that file names start from, and the COCO JSON."""

    images: Path
    annotations: Path


@dataclass(frozen=True)
class RawDataset:
    """What a source found or made."""

    train: RawSplit
    val: RawSplit
    attribution: str = ""
    findings: tuple[str, ...] = ()
    """What was met on the way and how it is handled, one sentence each."""


class Source(ABC):
    """One kind of dataset. A subclass has a nested `Config(BaseConfig)` and takes an instance of it."""

    Config: type[BaseConfig]

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def write(self, directory: Path) -> RawDataset:
        """Return both splits; files that do not exist yet are made below `directory`.

        Raises UserError when the data is not there or cannot be read.
        """
