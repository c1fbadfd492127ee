"""Listings: plans, artifacts and outcomes as lines of plain text, the same on a terminal and in a file."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.adoption import adoptable
from pipeline.log import duration
from pipeline.plan import Step, done
from pipeline.runner import Outcome, made_from
from pipeline.store import Finished, Store


def plan_lines(steps: Sequence[Step], store: Store) -> Iterator[str]:
    """Yield one line a step, whether it is done or would run, and a last one with the sum."""
    rows: list[tuple[str, ...]] = []
    contents: dict[str, str] = {}
    stopped: set[str] = set()
    counts = {"done": 0, "run": 0, "left out": 0}
    seconds = 0.0
    for step in steps:
        finished = done(step, store, contents)
        took = _took(finished or _last(step, store))
        if not stopped.isdisjoint(step.feeding):
            state, note = "left out", "a gate before it failed"
        elif finished:
            contents[step.name] = finished.content
            state, note = "done", f"took {duration(took)}" if took is not None else ""
        else:
            state, note = "run", f"took {duration(took)} last time" if took is not None else ""
            seconds += took or 0.0
            if step.target:
                note = "; ".join([_there(step.target, store), *([note] if note else [])])
            known = all(name in contents for name in step.feeding)
            if known and adoptable(step, made_from(step, contents), store):
                note += f"; only its code changed: --keep-older-code {step.entry} keeps the older result"
        if state == "left out" or (finished and finished.failures):
            stopped.add(step.name)
        counts[state] += 1
        rows.append((step.name, state, store.directory(step.uses, step.key).name, note))
    yield from columns(rows)
    about = f", about {duration(seconds)} by the last times" if seconds else ""
    left_out = f", {counts['left out']} left out" if counts["left out"] else ""
    yield f"{counts['done']} done, {counts['run']} to run{about}{left_out}"


def _last(step: Step, store: Store) -> Finished | None:
    """Return the newest artifact of the same node, or else of the same stage file."""
    made = store.of_kind(step.uses)
    return next((other for other in made if other.provenance.get("node") == step.name), next(iter(made), None))


def _there(target: str, store: Store) -> str:
    """Return where a step is done, and which machine that is, as far as it is known before results came back."""
    file = store.target(target)
    name = json.loads(file.read_text())["device"].get("name") if file.is_file() else None
    return f"on {target} ({name or 'its device: decided on the target'})"


def _took(finished: Finished | None) -> float | None:
    return float(finished.provenance["seconds"]) if finished else None


def show_lines(steps: Sequence[Step], store: Store) -> Iterator[str]:
    """Yield, for each step, where its artifact lies and how it was made: times, code, inputs, settings, files."""
    for step in steps:
        yield f"{step.name}: {step.uses}, key {step.key}"
        finished = store.finished(step.uses, step.key)
        if finished is None:
            yield "  not made yet; the settings it would be made with:"
            yield from _indented(step.settings)
            continue
        yield from _made_lines(finished)


def _made_lines(finished: Finished) -> Iterator[str]:
    provenance = finished.provenance
    commit = provenance["commit"]
    adopted = provenance.get("adopted_from")
    rows = [
        ("in", str(finished.directory)),
        ("made", f"{provenance['started']}, in {duration(provenance['seconds'])}, on {provenance['host']}"),
        ("by", " ".join(f"{name} {version}" for name, version in provenance["versions"].items())),
        ("code", f"{commit['id'][:12]}{' with changes' if commit['dirty'] else ''}" if commit else "no git commit"),
    ]
    if adopted:
        rows.append(("kept", f"from older code, {adopted['key'][:16]}"))
    rows += [("failed", failure) for failure in finished.failures]
    for slot, inputs in provenance["inputs"].items():
        rows += [("input", f"{slot}: {fed['node']} ({fed['key'][:16]})") for fed in inputs]
    files = [(size(file["bytes"]), file["sha256"][:16], name) for name, file in finished.files.items()]
    yield from (f"  {line}" for line in columns(rows))
    yield "  settings"
    yield from _indented(provenance["settings"])
    yield "  files"
    yield from (f"    {line}" for line in columns(files))


def _indented(settings: Any) -> Iterator[str]:
    yield from (f"    {name}: {json.dumps(value)}" for name, value in settings.items())


def outcome_lines(outcome: Outcome, store: Store) -> Iterator[str]:
    """Yield what a run came to: the last `summary.txt` among its artifacts, every `report.html`, where each result lies.

    What a stage writes under these names is shown so, whatever the stage.
    """
    summaries = [made.directory / "summary.txt" for made in outcome.finished.values()]
    last = next((path for path in reversed(summaries) if path.is_file()), None)
    if last:
        yield last.read_text(encoding="utf-8").rstrip("\n")
    reports = [name for name, made in outcome.finished.items() if (made.directory / "report.html").is_file()]
    yield from (f"report: {_shown(store.latest(name) / 'report.html')}" for name in reports)
    if last or reports:
        yield ""
    rows = [(str(_shown(store.latest(name))), made.directory.name) for name, made in outcome.finished.items()]
    yield from columns(rows)
    for name, reason in outcome.left_out.items():
        yield f"{name}: not made, because {reason}"


def _shown(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def columns(rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Yield the rows as lines whose columns are aligned."""
    table = list(rows)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def size(count: int) -> str:
    """Return a number of bytes as people read it: `812 B`, `3.2 MB`."""
    scaled, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if scaled < 1000 or unit == "TB":
            break
        scaled /= 1000
    return f"{count} B" if unit == "B" else f"{scaled:.1f} {unit}"
