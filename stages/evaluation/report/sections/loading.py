"""What was learnt from: some training images as they were augmented, and how long trainings waited for theirs."""

from __future__ import annotations

import base64

from stages.evaluation.report.evidence import Evidence
from stages.evaluation.report.page import Section, Table
from stages.evaluation.report.pictures import Panel, Strip
from stages.evaluation.report.wording import MISSING, seconds

TITLE = "Training images"


def loading(evidence: Evidence) -> Section | None:
    """The section; None where nothing was trained. Equal sheets are shown once, with all whose sheet it is."""
    trained = [one for one in evidence.trainings if one.iterations]
    if not trained:
        return None
    sheets: dict[bytes, list[str]] = {}
    for one in trained:
        if one.samples and one.path(one.samples).is_file():
            sheets.setdefault(one.path(one.samples).read_bytes(), []).append(one.name)
    lines = []
    for one in trained:
        total = one.seconds + one.waited
        share = f"{100 * one.waited / total:.1f} %" if total else MISSING
        lines.append((one.name, seconds(one.seconds), seconds(one.waited), share))
    uris = {
        "data:image/jpeg;base64," + base64.b64encode(sheet).decode(): ", ".join(names)
        for sheet, names in sheets.items()
    }
    strips = [Strip("the first of a training, augmented", (Panel(uri, names),)) for uri, names in uris.items()]
    return Section(
        TITLE,
        tables=[Table(("training", "in steps", "waiting for images", "share"), lines)],
        strips=strips,
        notes=["images are loaded while a step computes only with `workers`; `cache` keeps them decoded"],
    )
