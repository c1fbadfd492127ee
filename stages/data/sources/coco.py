"""The user's own COCO files: a folder of images and an instances JSON for each split."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.config import BaseConfig, ExternalFile, ExternalFolder
from stages.data import coco_layout
from stages.data.coco_document import parse
from stages.data.division import DivisionConfig, check_apart, written
from stages.data.source import RawDataset, RawSplit, Source


class Files(BaseConfig):
    """One split."""

    images: ExternalFolder
    """Folder that the file names in the annotations start from."""
    annotations: ExternalFile
    """COCO instances JSON."""


class Coco(Source):
    """Two files, or one that is divided."""

    class Config(DivisionConfig):
        """Where the files are."""

        train: Files
        """Images and annotations to train on."""
        val: Files | None = None
        """Images and annotations to validate on; give this or `val_fraction`."""

    config: Config

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        return any(True for _ in coco_layout.annotation_files(folder))

    @classmethod
    def settings(cls, folder: Path, given: Mapping[str, Path | None]) -> dict[str, Any]:
        return coco_layout.settings(folder, given)

    def write(self, directory: Path) -> RawDataset:
        """Return the user's files; with `val_fraction`, two JSONs written from one."""
        train, val = self.config.train, self.config.val
        if val is None:
            return written(directory, train.images.path, parse(train.annotations.path), None, self.config)
        if self.config.grouped:
            check_apart(parse(train.annotations.path), parse(val.annotations.path), self.config)
        return RawDataset(
            RawSplit(train.images.path, train.annotations.path), RawSplit(val.images.path, val.annotations.path)
        )
