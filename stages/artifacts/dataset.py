"""A dataset that was checked: where its images lie, what is annotated, which label is which class."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from deploy.image import ImageSpec
from pipeline.artifact import Artifact

SplitName = Literal["train", "val"]


class Split(BaseModel):
    """Images and their annotations, with counts of what detectors are trained on: crowds are not counted."""

    model_config = ConfigDict(frozen=True)

    images: str
    """Folder: absolute where the images are the user's, relative where they lie in the artifact."""
    annotations: str
    """Checked COCO JSON, in the artifact."""
    image_count: int
    box_count: int
    boxes_per_class: dict[str, int]


class Dataset(Artifact):
    """Training and validation images, both with COCO annotations and the same classes."""

    classes: tuple[str, ...]
    """Label i is classes[i]."""
    category_ids: tuple[int, ...]
    """Label i is category_ids[i] in the annotation files."""
    train: Split
    val: Split
    height: int
    """Of the canvas on which detectors see an image, in pixels."""
    width: int
    pad_rgb: tuple[int, int, int]
    """Mean colour of the training images, 0 to 255: fills what the image leaves of the canvas."""
    fingerprint: str
    """sha256 over the checked annotations and the contents of every image."""
    problems: tuple[str, ...] = ()
    """What was found and how it is handled, one sentence each."""
    attribution: str = ""
    """Whom the data comes from and under which licence, where that is known."""

    def folder(self, split: SplitName) -> Path:
        """The folder that a split's file names start from."""
        return self.path(self._split(split).images)

    def annotations(self, split: SplitName) -> Path:
        """The COCO JSON of a split."""
        return self.path(self._split(split).annotations)

    def image_spec(self) -> ImageSpec:
        """How an image becomes a detector's input, in training as on the device."""
        return ImageSpec(self.height, self.width, self.pad_rgb)

    def _split(self, name: SplitName) -> Split:
        return self.train if name == "train" else self.val
