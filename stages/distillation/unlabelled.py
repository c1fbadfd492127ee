"""Images without labels, on which a student learns what its teacher sees: a few a step, beside the labelled batch.

    folder --every image opened once, none of validation--> a split without boxes --by the step alone--> (n, 3, H, W)

Only methods that compare features learn from them (`learns_unlabelled`). A resumed run sees the same images.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Mapping
from functools import partial
from pathlib import Path

from pydantic import Field
from torch import Tensor

from deploy.image import ImageSpec
from pipeline.config import BaseConfig, Choice, ExternalFolder
from pipeline.errors import UserError
from pipeline.log import logger, progress
from stages.artifacts.dataset import Dataset
from stages.data.augment import AugmentConfig
from stages.data.coco import CocoSplit
from stages.data.coco_check import look
from stages.data.image_files import SUFFIXES, image_files
from stages.data.loader import Batch, training_batches
from stages.distillation.method import DistillationMethod

LISTED = "unlabelled.json"


class UnlabelledConfig(BaseConfig):
    """Which images, and how much they count."""

    images: ExternalFolder
    """Folder of images; those of the folders in it count too."""
    batch_size: int = Field(default=4, ge=1)
    """Images a step, beside the labelled batch."""
    weight: float = Field(default=1.0, gt=0)
    """What a method's loss on them counts beside its loss on the labelled batch."""


class Unlabelled:
    """The endless stream of them: the images of a step depend on the step and the seed alone."""

    def __init__(
        self, split: CocoSplit, spec: ImageSpec, augment: AugmentConfig, config: UnlabelledConfig, seed: int
    ) -> None:
        self.count, self.weight = len(split), config.weight
        self._from = partial(training_batches, split, spec, augment, config.batch_size, seed)
        self._next = 0
        self._batches: Generator[Batch, None, None] | None = None

    def images(self, step: int) -> Tensor:
        """uint8 (n, 3, H, W) of this step, augmented as labelled ones are."""
        if self._batches is None or step != self._next:
            self._batches = self._from(step)
        self._next = step + 1
        return next(self._batches).images_BCHW


def problems(config: UnlabelledConfig | None, methods: Mapping[str, Choice[DistillationMethod]]) -> Iterator[str]:
    """Images without labels that nobody would learn from."""
    if config and not any(choice.cls.learns_unlabelled for choice in methods.values()):
        named = ", ".join(choice.name for choice in methods.values())
        yield f"unlabelled: {named} cannot learn without labels; add a method that compares features, as pkd, or remove it"


def load(config: UnlabelledConfig, data: Dataset, directory: Path) -> CocoSplit:
    """The images of the folder as a split without boxes; their list stays in `directory`.

    Raises UserError where there are none, where one cannot be read, and where one is a validation image by its pixels.
    """
    folder = config.images.path
    files = sorted(file for file in image_files(folder) if file.is_file())
    if not files:
        raise UserError(
            f"unlabelled: no image lies in {folder}; it is looked for by the suffixes {', '.join(SUFFIXES)}"
        )
    validation = CocoSplit(data.folder("val"), data.annotations("val")).files
    with progress("unlabelled", len(validation) + len(files), "image") as advance:
        taken = {}
        for file in validation:
            seen = look(file)
            if not isinstance(seen, str):
                taken[seen.pixels] = file.name
            advance(1)
        records, wrong = [], []
        for number, file in enumerate(files):
            seen, name = look(file), file.relative_to(folder).as_posix()
            advance(1)
            if isinstance(seen, str):
                wrong.append(f"{name}: {seen or 'is gone'}")
            elif known := taken.get(seen.pixels):
                wrong.append(f"{name} is the validation image {known}")
            else:
                records.append({"id": number, "file_name": name, "height": seen.size[0], "width": seen.size[1]})
    if wrong:
        raise UserError(
            f"unlabelled: {len(wrong)} of {len(files)} images in {folder} cannot be used: " + "; ".join(wrong[:5])
        )
    (directory / LISTED).write_text(
        json.dumps({"images": records, "annotations": [], "categories": []}), encoding="utf-8"
    )
    logger.info("%d images without labels, %d a step", len(records), config.batch_size)
    return CocoSplit(folder, directory / LISTED)
