"""What a run says while it works: console, progress and `run.log` for our packages only; metrics as JSON lines.

On a terminal the console is rich's; otherwise each record is one plain line on standard error. Progress goes through
the logger too, so that `run.log` and a CI log show rate and time left.
"""

import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from pipeline.digest import write_atomically

if TYPE_CHECKING:
    from rich.console import Console

logger = logging.getLogger("headstart")
"""The logger that stages use; loggers named after our packages reach the same places."""

_OURS = ("headstart", "pipeline", "stages", "deploy")
_LINE_EVERY_S = 10.0


FILE_ONLY: Final = {"file_only": True}
"""The `extra` of a record that is for run.log, because the console shows the same in its own way."""


def _is_for_console(record: logging.LogRecord) -> bool:
    return not getattr(record, "file_only", False)


def _is_no_progress(record: logging.LogRecord) -> bool:
    return not getattr(record, "progress", False)


def to_console() -> None:
    """Send what our packages log to standard error: by rich on a terminal, as plain lines elsewhere."""
    handler: logging.Handler
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.logging import RichHandler

        handler = RichHandler(console=Console(stderr=True), show_path=False, show_level=False, rich_tracebacks=False)
        handler.addFilter(_is_no_progress)  # the bar shows it
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    handler.addFilter(_is_for_console)
    for name in _OURS:
        ours = logging.getLogger(name)
        ours.setLevel(logging.INFO)
        ours.handlers = [handler]
        ours.propagate = False


@contextmanager
def to_file(path: Path) -> Iterator[None]:
    """Append what our packages log to a file, as `run.log` in a node's directory, while the context lasts."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    loggers = [logging.getLogger(name) for name in _OURS]
    levels = [ours.level for ours in loggers]
    for ours in loggers:
        ours.addHandler(handler)
        ours.setLevel(logging.INFO)
    try:
        yield
    finally:
        for ours, level in zip(loggers, levels, strict=True):
            ours.removeHandler(handler)
            ours.setLevel(level)
        handler.close()


@contextmanager
def progress(title: str, total: int, unit: str = "step", done: int = 0) -> Iterator[Callable[..., None]]:
    """Show how far a loop of `total` units is, `done` of them by an earlier run; yields `advance(count=1, **numbers)`.

    On a terminal: a bar with rate, time left and the latest numbers. Elsewhere: a line about every ten seconds and one
    at the end. An exception ends it without the last line.
    """
    console = _console()
    if console is None:
        with _lines(title, total, unit, done) as advance:
            yield advance
        return
    from rich import progress as bars

    columns = (
        bars.TextColumn("{task.description}", markup=False),  # a node is called `student[seed=0]`
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TextColumn("{task.fields[rate]}", markup=False),
        bars.TimeRemainingColumn(),
        bars.TextColumn("{task.fields[numbers]}", markup=False),
    )
    with bars.Progress(*columns, console=console) as bar, _lines(title, total, unit, done) as advance:
        task = bar.add_task(title, total=total, completed=done, rate="", numbers="")

        def advance_both(count: int = 1, **numbers: float) -> None:
            advance(count, **numbers)
            speed = bar.tasks[task].speed
            rate = f"{speed:.3g} {unit}/s" if speed else ""
            text = _numbers(numbers) or bar.tasks[task].fields["numbers"]
            bar.update(task, advance=count, rate=rate, numbers=text)

        yield advance_both


def _console() -> "Console | None":
    """Return the console of the handler that `to_console` set, if it is a terminal's."""
    return next((h.console for h in logger.handlers if hasattr(h, "console")), None)


@contextmanager
def _lines(title: str, total: int, unit: str, done: int) -> Iterator[Callable[..., None]]:
    start = shown = time.monotonic()
    before, latest = done, ""

    def line() -> None:
        seconds = time.monotonic() - start
        rate = (done - before) / seconds if seconds > 0 else 0.0
        left = f", {duration((total - done) / rate)} left" if rate and done < total else f" in {duration(seconds)}"
        text = f"{title}: {done}/{total} {unit}, {rate:.3g} {unit}/s{left}{latest and ', ' + latest}"
        logger.info("%s", text, extra={"progress": True})

    def advance(count: int = 1, **numbers: float) -> None:
        nonlocal done, latest, shown
        done += count
        latest = _numbers(numbers) or latest
        now = time.monotonic()
        if now - shown >= _LINE_EVERY_S and done < total:
            shown = now
            line()

    yield advance
    line()


def _numbers(numbers: dict[str, float]) -> str:
    return " ".join(f"{name}={value:.4g}" for name, value in numbers.items())


def duration(seconds: float) -> str:
    """Return seconds as people write a duration: `3.2 s`, `4 min 05 s`, `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    minutes, whole = divmod(whole, 60)
    return f"{minutes} min {whole:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


class MetricsLog:
    """Numbers over steps, one JSON object a line, flushed at every line so that a killed run keeps them."""

    def __init__(self, path: Path, resume_step: int | None = None) -> None:
        """Start the file afresh, or, with `resume_step`, continue it: lines after that step are dropped."""
        kept = [] if resume_step is None or not path.exists() else _until(path, resume_step)
        write_atomically(path, "".join(kept).encode())
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, **values: float | int | str | None) -> None:
        """Write one line; a number that is not finite becomes null, which JSON has."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file; writing is an error afterwards."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _until(path: Path, step: int) -> list[str]:
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            record: Any = json.loads(line)
        except ValueError:  # the line a kill cut short
            continue
        if line.endswith("\n") and record["step"] <= step:
            kept.append(line)
    return kept
