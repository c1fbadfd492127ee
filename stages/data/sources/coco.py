"""The user's own COCO files: a folder of images and an instances JSON for each split."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from pydantic import Field, model_validator

from pipeline.config import BaseConfig, ExternalFile, ExternalFolder
from stages.data.coco_document import CocoDocument, parse
from stages.data.source import RawDataset, RawSplit, Source


class Files(BaseConfig):
    """One split."""

    images: ExternalFolder
    """Folder that the file names in the annotations start from."""
    annotations: ExternalFile
    """COCO instances JSON."""


class Coco(Source):
    """Two files, or one that is divided."""

    class Config(BaseConfig):
        """Where the files are."""

        train: Files
        """Images and annotations to train on."""
        val: Files | None = None
        """Images and annotations to validate on; give this or `val_fraction`."""
        val_fraction: float | None = Field(default=None, gt=0, lt=1)
        """Share of the images of `train` that is set aside for validation, where there is no second file."""
        seed: int = Field(default=0, ge=0)
        """Decides which images `val_fraction` sets aside."""

        @model_validator(mode="after")
        def _one_validation(self) -> Coco.Config:
            if (self.val is None) == (self.val_fraction is None):
                raise ValueError("give either `val` or `val_fraction`")
            return self

    config: Config

    def write(self, directory: Path) -> RawDataset:
        """Return the user's files; with `val_fraction`, two JSONs written from one."""
        train = RawSplit(self.config.train.images.path, self.config.train.annotations.path)
        if self.config.val is not None:
            return RawDataset(train, RawSplit(self.config.val.images.path, self.config.val.annotations.path))
        assert self.config.val_fraction is not None
        files = directory / "divided_train.json", directory / "divided_val.json"
        parts = divide(parse(train.annotations), self.config.val_fraction, self.config.seed)
        for file, part in zip(files, parts, strict=True):
            file.write_text(json.dumps(part), encoding="utf-8")
        return RawDataset(RawSplit(train.images, files[0]), RawSplit(train.images, files[1]))


def divide(document: CocoDocument, fraction: float, seed: int) -> tuple[CocoDocument, CocoDocument]:
    """Split one document by images, at random: what remains, and `fraction` of the images (at least one)."""
    ids = sorted({image["id"] for image in document["images"]})
    count = min(max(1, round(len(ids) * fraction)), len(ids))
    chosen = set(np.random.default_rng(seed).permutation(ids)[:count].tolist())

    def part(inside: bool) -> CocoDocument:
        return {
            "images": [image for image in document["images"] if (image["id"] in chosen) == inside],
            "annotations": [a for a in document["annotations"] if (a["image_id"] in chosen) == inside],
            "categories": document["categories"],
        }

    return part(inside=False), part(inside=True)
