"""Source: where a dataset comes from. It leaves a folder of images and a COCO JSON for each split, not yet checked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

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
    made: ClassVar[bool] = False
    """Whether `write` makes the images, so that there is nothing to look at before."""

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        """Whether `pipeline init` may take the folder for data of this kind."""
        return False

    @classmethod
    def settings(cls, folder: Path, given: Mapping[str, Path | None]) -> dict[str, Any]:
        """Settings of this source for a folder that is of its kind, as a config has them, for `pipeline init`; without `val`
        where nothing is there for it. `given` holds what the user named: `train_images`, `train_annotations` and so on.

        Raises UserError with everything that is missing or ambiguous.
        """
        raise NotImplementedError

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def write(self, directory: Path) -> RawDataset:
        """Return both splits; files that do not exist yet are made below `directory`.

        Raises UserError when the data is not there or cannot be read.
        """
