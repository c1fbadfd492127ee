"""There: what a stage sends to a target, and what it takes back, by `deploy.work`; its errors as the pipeline's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deploy import backend, work
from deploy.device import kind
from deploy.errors import DeployError
from deploy.work import Result, Task, UnfinishedError
from pipeline.errors import UserError, Waiting
from stages.artifacts.dataset import Dataset
from stages.artifacts.exported_model import ExportedModel

BACKENDS = tuple(f"deploy.backends.{name}" for name in backend.names())
"""Modules that are reached by name at run time, for the `CODE` of stages that open files."""


def sent(folder: Path, tasks: Sequence[Task], inputs: Mapping[str, Path]) -> list[str]:
    """Write the folder of some work and return the command that does it. Raises UserError."""
    if not tasks:
        raise UserError("no exported model is wired, and a target measures nothing else; wire one by needs")
    try:
        work.write(folder, tasks, inputs)
    except DeployError as error:
        raise UserError(str(error)) from error
    return list(work.COMMAND)


def taken(folder: Path) -> tuple[dict[str, Result], dict[str, Any]]:
    """Return the results by task, and what the machine is that they are of.

    Raises Waiting while some lack, and UserError for results of other work, other files or several machines.
    """
    try:
        results = work.results(folder)
    except UnfinishedError as error:
        raise Waiting(str(error)) from None
    except DeployError as error:
        raise UserError(str(error)) from error
    return results, kind(next(iter(results.values())).device)


def model_files(model: ExportedModel) -> dict[str, Path]:
    """Return the files of a model by their names there: its own and what lies beside it, as a sidecar."""
    file = model.path(model.file)
    return {f"models/{model.name}/{one.name}": one for one in sorted(file.parent.glob(f"{file.name}*"))}


def model_settings(model: ExportedModel, **runtime: Any) -> dict[str, Any]:
    """Return how a task opens a model; `runtime` are the backend's settings, without those that are None."""
    given = {name: value for name, value in runtime.items() if value is not None}
    return {"model": f"inputs/models/{model.name}/{model.file}", "backend": model.backend, "runtime": given}


def image_files(data: Dataset, count: int | None = None) -> dict[str, Path]:
    """Return the validation images, or the first of them, by their names there, in the order of the annotations."""
    names = [image["file_name"] for image in json.loads(data.annotations("val").read_bytes())["images"]]
    return {f"images/{name}": data.folder("val") / name for name in names[:count]}
