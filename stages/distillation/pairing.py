"""Which map of the student learns from which map of the teacher, and how two maps of a pair get equal channels and sizes.

student's maps --1x1 convolution where channels differ--> --bilinear where sizes differ--> beside the teacher's
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.errors import UserError
from stages.detection.detector import Detector
from stages.detection.records import Features

Pairing = Literal["stride", "index"]
Stages = Literal["neck", "backbone", "all"]
Adapters = Literal["needed", "separate", "shared"]


def pair_levels(
    student_strides: Sequence[int], teacher_strides: Sequence[int], how: Pairing = "stride"
) -> list[tuple[int, int]]:
    """Indices (student's, teacher's) of the maps that go together, the student's ascending.

    `stride` pairs maps of equal stride and leaves out the rest: P2-P5 and P3-P6 share P3, P4 and P5. `index` pairs the
    finest with the finest, the next with the next, until one has no more. Raises ValueError naming both lists of strides
    where nothing pairs.
    """
    if how == "index":
        pairs = [(level, level) for level in range(min(len(student_strides), len(teacher_strides)))]
    else:
        place = {stride: level for level, stride in enumerate(teacher_strides)}
        pairs = [(level, place[stride]) for level, stride in enumerate(student_strides) if stride in place]
    if not pairs:
        raise ValueError(
            f"no maps to pair by {how}, the student has strides {list(student_strides)}, the teacher "
            f"{list(teacher_strides)}; pairing: index needs a map on both sides, pairing: stride one of equal stride"
        )
    return pairs


def adapters(
    pairs: Sequence[tuple[int, int]],
    student_channels: Sequence[int],
    teacher_channels: Sequence[int],
    always: bool = False,
) -> nn.ModuleList:
    """A 1x1 convolution for each pair from the student's channels to the teacher's; identity where they are equal already,
    unless `always`."""
    channels = [(student_channels[mine], teacher_channels[theirs]) for mine, theirs in pairs]
    return nn.ModuleList(nn.Identity() if s == t and not always else nn.Conv2d(s, t, 1) for s, t in channels)


def resized(map_BCHW: Tensor, size: Sequence[int]) -> Tensor:
    """The map at (rows, columns) `size`, bilinear; the same tensor where it has them already."""
    if tuple(map_BCHW.shape[-2:]) == tuple(size):
        return map_BCHW
    return functional.interpolate(map_BCHW, tuple(size), mode="bilinear")


def backbone_shape(detector: Detector) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Strides and channels of `Features.backbone`, from shapes alone: nothing is computed and the detector stays as it is."""
    size = 128  # a multiple of every stride
    shadow = copy.deepcopy(detector).eval().to("meta")
    with torch.no_grad():
        stages = shadow.features(torch.empty(1, 3, size, size, device="meta")).backbone
    return tuple(size // stage.shape[-1] for stage in stages), tuple(stage.shape[1] for stage in stages)


class PairedMaps(nn.Module):
    """The maps of two detectors side by side. `pairs` lists, for the backbone's and the neck's maps that `stages` names,
    who goes with whom (neck never with backbone); `channels` are the teacher's, per pair.

    `kind` says which pairs get a 1x1 convolution: those whose channels differ (`needed`), every one (`separate`), or one
    convolution for all pairs (`shared`), which asks for equal channels in all of them.
    """

    def __init__(
        self,
        method: str,
        student: Detector,
        teacher: Detector,
        how: Pairing = "stride",
        stages: Stages = "neck",
        kind: Adapters = "needed",
    ) -> None:
        """Reads shapes and keeps neither detector. Raises UserError, said of `method`, where nothing pairs or nothing can
        be shared."""
        super().__init__()
        self.pairs: list[tuple[bool, int, int]] = []  # of the backbone?, the student's index, the teacher's
        self.channels: list[int] = []
        made: list[nn.Module] = []
        from_to: set[tuple[int, int]] = set()
        for backbone in [True] * (stages != "neck") + [False] * (stages != "backbone"):
            mine = backbone_shape(student) if backbone else (student.strides, student.channels)
            theirs = backbone_shape(teacher) if backbone else (teacher.strides, teacher.channels)
            try:
                pairs = pair_levels(mine[0], theirs[0], how)
            except ValueError as problem:
                raise UserError(f"method {method}: {'backbone' if backbone else 'neck'}: {problem}") from problem
            self.pairs += [(backbone, s, t) for s, t in pairs]
            self.channels += [theirs[1][t] for _, t in pairs]
            from_to |= {(mine[1][s], theirs[1][t]) for s, t in pairs}
            made += adapters(pairs, mine[1], theirs[1], always=kind != "needed")
        if kind == "shared" and len(from_to) > 1:
            raise UserError(
                f"method {method}: one adapter for all maps needs equal channels, these go from the student's to the "
                f"teacher's by {sorted(from_to)}; take adapters: separate"
            )
        self.adapters = nn.ModuleList(made[:1] if kind == "shared" else made)

    def forward(self, student: Features, teacher: Features) -> list[tuple[Tensor, Tensor]]:
        """(student's map adapted and resized, the teacher's map detached) per pair, of equal shape BCHW."""
        result = []
        for number, (backbone, s, t) in enumerate(self.pairs):
            mine, theirs = (f.backbone if backbone else f.levels for f in (student, teacher))
            wanted, adapter = theirs[t].detach(), self.adapters[number % len(self.adapters)]
            result.append((resized(adapter(mine[s]), wanted.shape[-2:]), wanted))
        return result
