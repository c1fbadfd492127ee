"""Several training images in one: mosaic (four about a centre; YOLOv4, arXiv 2004.10934) and mixup (two, blended;
arXiv 1710.09412, for detectors 1902.04103).

    mosaic:  first  | second      Each part of the canvas is a canvas of its own: an image is placed in it as it would be
             -------+-------      alone, from its part's top left, and what is larger than the part is cut.
             third  | fourth
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from deploy.image import ImageSpec
from stages.data.augment import AugmentConfig, Laid, Pixels, Placed, drawn_factor, put, scaled
from stages.data.coco import Sample

CENTRE = (0.25, 0.75)  # of the canvas: where the four images of a mosaic may meet
BLEND = (
    32.0  # of both parameters of the beta distribution: weights lie near one half, within 0.4 to 0.6 for 98 % of images
)


def mosaic(
    samples: Sequence[Sample],
    spec: ImageSpec,
    config: AugmentConfig,
    rng: np.random.Generator,
    canvas_HWC: Pixels | None = None,
) -> Placed:
    """Put four samples on one canvas, each at its own factor of `mosaic_jitter`. Its content is the whole canvas."""
    assert len(samples) == 4, "a mosaic has four parts"
    canvas_HWC = np.empty((spec.height, spec.width, 3), np.uint8) if canvas_HWC is None else canvas_HWC
    # At least one pixel for each part, however small the canvas.
    y, x = (min(max(1, round(side * rng.uniform(*CENTRE))), side - 1) for side in (spec.height, spec.width))
    areas = [(slice(0, y), slice(0, x)), (slice(0, y), slice(x, None))]
    areas += [(slice(y, None), slice(0, x)), (slice(y, None), slice(x, None))]
    parts: list[Laid] = []
    for sample, (rows, columns) in zip(samples, areas, strict=True):
        full = scaled(spec.content_size(*sample.size), drawn_factor(config.mosaic_jitter, rng))
        (part,) = put(sample, full, spec, config, rng, canvas_HWC[rows, columns]).parts
        parts.append(part._replace(origin=(columns.start, rows.start)))
    return Placed(canvas_HWC, tuple(parts), (spec.height, spec.width))


def mixup(placed: Placed, other: Placed, rng: np.random.Generator) -> Placed:
    """Blend `other` into `placed`, in place. Both keep their boxes and labels, with full weight."""
    weight = round(256 * rng.beta(BLEND, BLEND))  # whole numbers: the same bits on every machine
    mixed = placed.canvas_HWC.astype(np.uint16) * np.uint16(weight)
    mixed += other.canvas_HWC.astype(np.uint16) * np.uint16(256 - weight)
    placed.canvas_HWC[:] = (mixed + np.uint16(128)) >> np.uint16(8)
    return Placed(
        placed.canvas_HWC,
        placed.parts + other.parts,
        (max(placed.size[0], other.size[0]), max(placed.size[1], other.size[1])),
    )
