"""A first config for a folder of data: finds what is there, chooses a student for a budget, and says so.

    folder --Source.recognises, Source.settings--> a source, read once --> classes, canvas --students--> the config

`pipeline init FOLDER` calls `write`. A source or a detector that is one more file joins by itself.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from string import Template
from typing import Any

from deploy.cuda import devices
from deploy.machine import cores
from pipeline import lookup
from pipeline.config import Choice
from pipeline.document import parse as parsed
from pipeline.errors import UserError
from stages.data.coco_document import CocoDocument, parse
from stages.data.source import Source
from stages.starting.duration import minutes
from stages.starting.starter_config import CONFIG
from stages.starting.students import Student, choose, explained

LONG_SIDE_PX = 320  # small enough for a CPU
STRIDE = 32  # canvas sides are multiples of it
VAL_FRACTION = 0.2
LISTED = 10  # classes that are named in a message


def write(
    folder: Path,
    out: Path,
    source: str | None = None,
    gflops: float | None = None,
    target: str | None = None,
    **given: Path | None,
) -> list[str]:
    """Write a config for the data in `folder` to `out`. `source` is its format, where that is not to be found out; `given`
    (`train_images` and the like) is not looked for; `target` is a machine on which the student is to be measured.

    Returns lines that say what was found. Raises UserError with everything that was not found, or found twice, and
    when `out` exists.
    """
    if out.exists():
        raise UserError(f"init: {out} exists; name another file, or remove it")
    if not folder.is_dir():
        raise UserError(f"init: no folder {folder}; give the one that holds images and annotations")
    name = source or ("coco" if any(given.values()) else _kind(folder))
    if name != "coco" and (named := [option for option, path in given.items() if path]):
        raise UserError(f"init: --{named[0].replace('_', '-')} is for COCO data, and this is {name}; leave it out")
    settings = _source(name).settings(folder, given)
    divided = "val" not in settings
    train, val = _read(name, {**settings, **({"val_fraction": VAL_FRACTION} if divided else {})})
    classes = [category["name"] for category in sorted(train["categories"], key=lambda category: category["id"])]
    if not classes:
        raise UserError(f"init: the training data below {folder} has no classes; give annotations that have some")
    sizes = {(i["height"], i["width"]) for i in train["images"] if i.get("height") and i.get("width")}
    height, width = canvas(sizes)
    student = choose(height, width, len(classes), gflops)
    text = Template(CONFIG).substitute(
        file=out,
        jobs=2 if cores() > 1 and not devices()[0] else 1,
        folder=folder,
        source="\n      ".join(_source_lines(name, settings)),
        classes=json.dumps(classes, ensure_ascii=False),
        height=height,
        width=width,
        student="\n      ".join(_student_lines(student)),
        gflops=f"{student.gflops:.2f}",
        target=_target_lines(target),
    )
    took = minutes(parsed(text, str(out))[0], len(classes))
    partial = out.with_name(f".{out.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(out)
    shown = ", ".join(classes[:LISTED]) + (", ..." if len(classes) > LISTED else "")
    return [
        f"{name}: {json.dumps(settings, ensure_ascii=False)}",
        f"training: {_counts(train)}",
        f"validation: {_counts(val)}{_set_aside(name) if divided else ''}",
        f"classes: {len(classes)} ({shown})",
        f"canvas: {height} x {width} (height x width); larger finds smaller objects and takes longer",
        f"student: {student.summary()}; --gflops sets another budget",
        f"trainings: about {_spoken(took)} on this machine, by a step of each, without loading images; for a first look see the "
        f"head of {out}",
        f"written: {out}; next: pipeline check {out}, then: pipeline run {out}",
    ]


def _spoken(minutes: float) -> str:
    return f"{max(1, round(minutes))} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def _source(name: str) -> type[Source]:
    package = f"{Source.__module__}s"
    return lookup.subclass(lookup.module(package, name), Source)


def _kind(folder: Path) -> str:
    """The one format whose files are there."""
    known = lookup.names(f"{Source.__module__}s")
    found = [name for name in known if _source(name).recognises(folder)]
    if not found:
        raise UserError(
            f"init: {folder} holds no data of a known layout: COCO needs a JSON with images, annotations with bbox and "
            "categories; VOC XML files; YOLO a YAML file with train and names; name your files by --train-annotations"
        )
    if len(found) > 1:
        options = " or ".join(f"--{name}" for name in found)
        raise UserError(f"init: {folder} can be read as {' and as '.join(found)}; say which by {options}")
    return found[0]


def _read(name: str, settings: Mapping[str, Any]) -> tuple[CocoDocument, CocoDocument]:
    """What the source makes of its settings: so they are known to work. Raises UserError where they do not."""
    choice: Choice[Source] = Choice.parse(Source, {"name": name, **settings})
    with tempfile.TemporaryDirectory() as directory:
        raw = choice.cls(choice.config).write(Path(directory))
        return parse(raw.train.annotations), parse(raw.val.annotations)


def _counts(document: CocoDocument) -> str:
    return f"{len(document['images']):,} images, {len(document['annotations']):,} boxes"


def _set_aside(name: str) -> str:
    better = "by --val-annotations and --val-images" if name == "coco" else "by `val`"
    return (
        f"; nothing was found for it, so {VAL_FRACTION:.0%} of the training images are set aside (val_fraction); better: "
        f"images taken apart, {better}"
    )


def _source_lines(name: str, settings: Mapping[str, Any]) -> list[str]:
    """YAML of the source; JSON strings are YAML strings, whatever is in a path."""

    def flow(value: Any) -> str:
        if isinstance(value, Mapping):
            return "{" + ", ".join(f"{key}: {flow(item)}" for key, item in value.items()) + "}"
        return json.dumps(value, ensure_ascii=False)

    lines = [f"name: {name}", *(f"{key}: {flow(value)}" for key, value in settings.items())]
    if "val" not in settings:
        lines += [
            f"val_fraction: {VAL_FRACTION}  # drawn by `seed`",
            "# group_by: '^(video[0-9]+)_'   # images with the same match stay on one side: frames of one video, one place",
        ]
    return lines


def _student_lines(student: Student) -> list[str]:
    rows = [(f"{key}: {json.dumps(value)}", meaning) for key, value, meaning in explained(student)]
    wide = max(len(text) for text, _ in rows) + 3
    return [f"name: {student.choice.name}", *(f"{text:<{wide}}# {_brief(meaning)}" for text, meaning in rows)]


def _brief(meaning: str) -> str:
    """The first sentence of a setting's description, on one line."""
    return " ".join(meaning.split()).partition(". ")[0].rstrip(".")


def _target_lines(target: str | None) -> str:
    """Stages that another machine does, and how it is reached."""
    if target is None:
        return ""
    name = "".join(c if c.isalnum() else "_" for c in target.rpartition("@")[2].partition(".")[0]) or "device"
    reached = (
        f"{{ssh: {json.dumps(target)}}}"
        if "@" in target
        else "{}   # no ssh: `pipeline run` writes folders to carry there"
    )
    return (
        f"  accuracy_{name}: {{uses: validate, needs: {{models: [onnx]}}, target: {name}}}   # the file that ships, there\n"
        f"  latency_{name}: {{uses: benchmark, needs: {{models: [onnx]}}, target: {name}}}\n"
        f"targets:\n  {name}: {reached}\n"
    )


def canvas(sizes: Collection[tuple[int, int]]) -> tuple[int, int]:
    """The (height, width) that holds images of these sizes with little padding, the long side at most 320 px.

    Square where no sizes are known. Images smaller than that are not enlarged, but for the multiple of 32.
    """
    long = min(LONG_SIDE_PX, max((max(size) for size in sizes), default=LONG_SIDE_PX))
    fitted = [(height * long / max(height, width), width * long / max(height, width)) for height, width in sizes]
    height, width = (math.ceil(max(sides) / STRIDE) * STRIDE for sides in zip(*fitted or [(long, long)], strict=True))
    return height, width
