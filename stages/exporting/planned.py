"""Which file a stage of a plan will give, before anything is made."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from pipeline.errors import UserError
from pipeline.stage import NodeView
from stages.exporting.foreign import loaded, precision_of


@dataclass(frozen=True)
class PlannedFile:
    """Its precision, where its NMS is, and the runtime that its int8 is for."""

    precision: str
    nms: str
    int8_for: str | None = None


def planned_file(node: NodeView) -> PlannedFile | None:
    """What `export`, `external` or `quantize` will write; None of other stages."""
    settings: Any = node.config
    if node.uses == "export":
        return PlannedFile(settings.precision, settings.nms)
    if node.uses == "external":
        try:
            return PlannedFile(precision_of(loaded(settings.model.path)), settings.nms)
        except UserError:  # said by its own check
            return None
    if node.uses == "quantize":
        source = next((planned_file(behind) for behind in node.feeding("model")), None)
        return replace(source, precision="int8", int8_for=settings.runtime) if source else None
    return None
