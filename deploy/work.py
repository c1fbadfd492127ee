"""Work: a folder carried to another machine, done there, and carried back.

    work.json               tasks, and size and sha256 of each file they read; its own sha256 is the work's identity
    inputs/...              models with what lies beside them, annotations, images
    deploy/                 this package: there must be Python, numpy, Pillow and a runtime there, and nothing of ours
    results/TASK/           result.json, and the files it lists; made there, seen when whole

`cd FOLDER && python3 -m deploy work .` does it. A task is a file of `deploy/tasks/`, done by the folder's own code in a
process of its own, so that one that dies takes nothing with it, and memory and GPU begin afresh. What has a whole result
is not done again.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import pkgutil
import secrets
import shutil
import subprocess
import sys
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy import atomic
from deploy.digest import digest
from deploy.errors import DeployError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

SCHEMA_VERSION = 1
COMMAND = ("-m", "deploy", "work", ".")
"""What the Python there is given, in the folder."""


class UnfinishedError(DeployError):
    """Some tasks have no result yet."""


@dataclass(frozen=True)
class Task:
    """One thing to do: `does` names a file of `deploy/tasks/`, `settings` are its own; paths start at the folder."""

    name: str
    does: str
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """What came of a task: its value, the files it left, the device that did it, when."""

    value: dict[str, Any]
    files: dict[str, Path]
    device: dict[str, Any]
    finished: str


def names() -> list[str]:
    """What a task may do: the files of `deploy/tasks/`."""
    import deploy.tasks

    return sorted(module.name for module in pkgutil.iter_modules(deploy.tasks.__path__))


def write(folder: Path, tasks: Sequence[Task], inputs: Mapping[str, Path]) -> None:
    """Writes the folder of some work; `inputs` are the files that it reads, by their names below `inputs/`.

    A folder that holds this work already is left as it is, with its results; one of other work, or with other code, is
    replaced. Each folder is an attempt of its own: what was done in one that is gone is no result of it, wherever it
    still lies. Raises DeployError for a task that nothing does, two of one name, or a file that is missing.
    """
    problems = [
        f"nothing does {task.does!r}; there are {', '.join(names())}" for task in tasks if task.does not in names()
    ]
    if len({task.name for task in tasks}) < len(tasks):
        problems.append(f"two tasks have one name among {[task.name for task in tasks]}")
    problems += [f"{file} is missing" for file in inputs.values() if not file.is_file()]
    if problems:
        raise DeployError(f"{folder}: " + "; ".join(problems))
    package = Path(__file__).parent
    code = {f"{package.name}/{file.relative_to(package).as_posix()}": file for file in package.rglob("*.py")}
    files = {f"inputs/{name}": digest(file) for name, file in inputs.items()}
    files |= {name: digest(file) for name, file in code.items()}
    plan = {"schema_version": SCHEMA_VERSION, "tasks": [asdict(task) for task in tasks], "files": files}
    manifest = folder / "work.json"
    if manifest.is_file():
        there = _read(manifest)
        if isinstance(there, dict) and {**there, "attempt": None} == {**plan, "attempt": None}:
            return
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for name, file in inputs.items():
        _link(file, partial / "inputs" / name)
    for name, file in code.items():
        _link(file, partial / name, copy=True)
    text = json.dumps({"attempt": secrets.token_hex(8), **plan}, indent=1, sort_keys=True)
    (partial / "work.json").write_text(text + "\n", encoding="utf-8")
    atomic.publish(partial, folder)


def do(folder: Path, tell: Callable[[str], None] = lambda line: None) -> None:
    """Does every task of a folder that has no result of it yet; `tell` is given lines for people.

    Raises DeployError when the folder is not as it was written, another process is at work in it, or a task fails;
    what is done stays.
    """
    plan = _plan(folder)
    with _alone(folder):
        left = [task for task in plan.tasks if not _is_done(folder, plan, task)]
        if len(left) < len(plan.tasks):
            tell(f"{len(plan.tasks) - len(left)} of {len(plan.tasks)} tasks were done before")
        if changed := [
            problem for name in plan.files if left and (problem := _changed(folder, name, plan.files[name]))
        ]:
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise DeployError(f"{folder}: {'; '.join(changed[:3])}{more}; copy the folder again")
        for task in left:
            tell(f"{task.name}: {task.does}")
            command = [sys.executable, "-m", "deploy", "work", ".", "--task", task.name]
            code = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, check=False).returncode
            if code or not _is_done(folder, plan, task):
                how = f"was killed by signal {-code}; is there enough memory?" if code < 0 else "failed, as said above"
                raise DeployError(f"{folder}: task {task.name} {how}; mend it and give the same command again")
            tell(f"{task.name}: done")


def do_one(folder: Path, name: str) -> None:
    """Does one task in this process, whether or not it has a result. Raises DeployError for one that is not there."""
    from datetime import datetime, timezone

    from deploy.device import device

    plan = _plan(folder)
    task = next((one for one in plan.tasks if one.name == name), None)
    if task is None:
        raise DeployError(f"{folder}: no task {name!r}; there are {', '.join(one.name for one in plan.tasks)}")
    partial = folder / "results" / f".{name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    value = importlib.import_module(f"deploy.tasks.{task.does}").do(task.settings, folder, partial)
    record = {
        "work": plan.identity,
        "task": name,
        "inputs": {name: file["sha256"] for name, file in plan.files.items()},
        "value": value,
        "files": {
            file.relative_to(partial).as_posix(): digest(file) for file in sorted(partial.rglob("*")) if file.is_file()
        },
        "device": device(),
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    (partial / "result.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    atomic.publish(partial, folder / "results" / name)


def results(folder: Path) -> dict[str, Result]:
    """What came back, by task.

    Raises DeployError when a result is not of this work, was made from another file, was changed on the way, or they
    are of several devices; UnfinishedError when some lack and those that are there are right.
    """
    from deploy.device import kind

    plan = _plan(folder)
    found: dict[str, Result] = {}
    problems, lacking = [], []
    for task in plan.tasks:
        directory = folder / "results" / task.name
        if not (directory / "result.json").is_file():
            lacking.append(task.name)
            continue
        record = _read(directory / "result.json")
        problems += [f"results/{task.name}: {problem}" for problem in _problems(record, directory, plan, task)]
        if not problems:
            files = {name: directory / name for name in record["files"]}
            found[task.name] = Result(record["value"], files, record["device"], record["finished"])
    kinds = [kind(one.device) for one in found.values()]
    if any(one != kinds[0] for one in kinds):
        devices = ", ".join(f"{name} of {one.device['name']}" for name, one in found.items())
        problems.append(f"results: they are of several devices: {devices}")
    if problems:
        raise DeployError(
            f"{folder}: {'; '.join(problems)}; remove its results, and do or copy them again from the right machine"
        )
    if lacking:
        raise UnfinishedError(f"{len(lacking)} of {len(plan.tasks)} tasks have no result yet ({', '.join(lacking)})")
    return found


@dataclass(frozen=True)
class _Plan:
    tasks: tuple[Task, ...]
    files: dict[str, dict[str, Any]]
    identity: str


def _plan(folder: Path) -> _Plan:
    values = _read(folder / "work.json")
    version = values.get("schema_version") if isinstance(values, dict) else None
    if version != SCHEMA_VERSION:
        raise DeployError(
            f"{folder / 'work.json'}: schema_version {version!r} is not {SCHEMA_VERSION}; use the deploy beside it"
        )
    identity = hashlib.sha256((folder / "work.json").read_bytes()).hexdigest()
    return _Plan(tuple(Task(**task) for task in values["tasks"]), values["files"], identity)


def _problems(record: Any, directory: Path, plan: _Plan, task: Task) -> Iterator[str]:
    """What is wrong with the record of a result, and with the files beside it."""
    wanted = ("work", "task", "inputs", "value", "files", "device", "finished")
    if not isinstance(record, dict) or any(name not in record for name in wanted):
        yield f"result.json is not a result; it has not {', '.join(wanted)}"
        return
    for name, file in plan.files.items():
        if record["inputs"].get(name) != file["sha256"]:
            given = str(record["inputs"].get(name))[:16]
            yield f"made from another {name} (sha256 {given}, wanted {file['sha256'][:16]})"
            return
    if record["work"] != plan.identity or record["task"] != task.name:
        yield f"of task {record['task']} of other work ({record['work'][:16]}, wanted {plan.identity[:16]})"
    for name, file in record["files"].items():
        if problem := _changed(directory, name, file):
            yield problem


def _is_done(folder: Path, plan: _Plan, task: Task) -> bool:
    directory = folder / "results" / task.name
    if not (directory / "result.json").is_file():
        return False
    return not any(_problems(_read(directory / "result.json"), directory, plan, task))


def _changed(folder: Path, name: str, wanted: dict[str, Any]) -> str:
    """How a file differs from its description, or nothing."""
    if name.startswith("/") or ".." in Path(name).parts:
        return f"{name} lies outside"
    if not (folder / name).is_file():
        return f"{name} is missing"
    return "" if digest(folder / name) == wanted else f"{name} was changed"


def _link(source: Path, target: Path, copy: bool = False) -> None:
    """A second name for a file, or its copy: where links are not possible, and of code, which is edited in its place."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if not copy:
        with suppress(OSError):  # another file system, or one without links: the copy will do
            os.link(source, target)
            return
    shutil.copyfile(source, target)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keeps two processes from the same work: each would disturb what the other measures."""
    try:
        import fcntl
    except ImportError:  # no such locks on this system
        yield
        return
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DeployError(f"{folder}: another process is at work in it; wait for it, or end it") from error
        yield


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DeployError(f"{file}: it cannot be read ({error}); a folder of work is wanted") from error
