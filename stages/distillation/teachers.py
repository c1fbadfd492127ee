"""The teachers of a distillation: loaded with their classes checked, and which of them a method learns from."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from pipeline.errors import PipelineError, UserError, did_you_mean
from stages.artifacts.checkpoint import Checkpoint, Teacher
from stages.detection.detector import Detector
from stages.detection.load import checksum, load_detector


def chosen(wanted: str | None, needed: bool, names: Collection[str]) -> str | None:
    """The name of the teacher that a method learns from; None where it names none and needs none.

    `wanted` is a node's name or its stage's: `teacher` means `teacher[seed=0]` where that is the only one. Raises
    UserError where it means none or several, and where one is needed and it is not clear which.
    """
    if wanted is None:
        if not needed:
            return None
        if len(names) == 1:
            return next(iter(names))
        if names:
            raise UserError(
                f"it learns from one teacher and there are several, {', '.join(names)}; say which with teacher: NAME"
            )
        raise UserError("it needs a teacher; wire one with needs: {teacher: STAGE}")
    found = [name for name in names if wanted in (name, name.partition("[")[0])]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"teacher: {wanted} means several, {', '.join(found)}; give the whole name of one")
    close = did_you_mean(wanted, names) or "; wire one with needs: {teacher: STAGE}"
    raise UserError(f"teacher: {wanted} is no teacher of this stage{close}")


def load_teachers(checkpoints: Iterable[Checkpoint], classes: Sequence[str]) -> dict[str, Detector]:
    """Each teacher's detector by its node's name, in eval mode. Raises UserError where one knows other classes."""
    found = {}
    for one in checkpoints:
        if one.classes != tuple(classes):
            raise UserError(
                f"distill: the teacher {one.name} knows {list(one.classes[:5])}, the dataset {list(classes[:5])} "
                "(first five of each); a teacher must have learnt the same classes in the same order"
            )
        found[one.name] = load_detector(one.detector, len(one.classes), one.path(one.weights))
    return found


def check_untouched(teachers: Iterable[Teacher], detectors: dict[str, Detector]) -> None:
    """Raise PipelineError where a teacher's tensors are not those it came with."""
    changed = [one.name for one in teachers if checksum(detectors[one.name]) != one.checksum]
    if changed:
        raise PipelineError(
            f"distill: the weights of {', '.join(changed)} changed while it taught; a method trains what it must only read"
        )
