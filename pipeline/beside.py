"""Side by side: nodes that run in processes of their own while others do, each with its share of the cores.

On a CPU two small trainings of one thread each end sooner than one after the other with two threads, and lose far less
when something else wants a core too. Which nodes may is said by their stage (`SIDE_BY_SIDE = True`: it keeps its cores
busy for minutes, and times nothing); how many at once, by `jobs` of the config.
"""

import logging
import os
import re
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from queue import SimpleQueue
from types import TracebackType
from typing import Self, TextIO

from pipeline.errors import PipelineError
from pipeline.plan import Step, cores

_logger = logging.getLogger("pipeline.beside")
_TIME = re.compile(r"\d\d:\d\d:\d\d ")
_PATIENCE_S = 30.0  # for a process that was told to stop


class StoppedError(PipelineError):
    """A process that made a node ended without having made it; it has said why, and its exit code is kept."""

    def __init__(self, node: str, code: int) -> None:
        how = (
            f"was killed by signal {-code}; is there enough memory for `jobs` at once?"
            if code < 0
            else "said why above"
        )
        super().__init__(f"not made: its process {how}")
        self.node = node
        self.exit_code = 1 if code < 0 else code


@dataclass
class Beside:
    """At most `jobs` processes, each making one node. `command` gives the command line that makes a step."""

    jobs: int
    command: Callable[[Step], list[str]]
    _running: dict[str, "subprocess.Popen[str]"] = field(default_factory=dict)
    _ended: "SimpleQueue[str]" = field(default_factory=SimpleQueue)

    @property
    def busy(self) -> bool:
        """Whether any process is running."""
        return bool(self._running)

    @property
    def free(self) -> bool:
        """Whether one more may start."""
        return len(self._running) < self.jobs

    def start(self, step: Step) -> None:
        """Start the process that makes a step; what it says is passed on, its name before each line."""
        # A session of its own: Ctrl-C reaches this process alone, which then stops the others once.
        process = subprocess.Popen(
            self.command(step),
            stdin=subprocess.PIPE,  # never written to; its end tells the process that this one is gone
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=_environment(self.jobs),
            start_new_session=True,
        )
        self._running[step.name] = process
        assert process.stderr is not None
        threading.Thread(target=self._pass_on, args=(step.name, process.stderr), daemon=True).start()

    def wait(self) -> str:
        """Wait until a process has ended and return its node's name. Raises StoppedError if it failed."""
        name = self._ended.get()
        process = self._running.pop(name)
        code = process.wait()
        _close(process)
        if code:
            raise StoppedError(name, code)
        return name

    def _pass_on(self, name: str, lines: TextIO) -> None:
        with lines:
            for line in lines:
                said = _TIME.sub("", line.rstrip("\n"), count=1)
                _logger.info("%s", said if said.startswith(f"{name}: ") else f"{name}: {said}")
        self._ended.put(name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Let the others end by themselves after a failure, stop them after an interruption."""
        interrupted = kind is not None and not issubclass(kind, Exception)
        for process in self._running.values():
            if interrupted:
                process.terminate()
        for name, process in self._running.items():
            if not interrupted:
                _logger.info("%s: going on to its end; Ctrl-C stops it", name)
            _wait(process, _PATIENCE_S if interrupted else None)
            _close(process)


def _wait(process: "subprocess.Popen[str]", patience_s: float | None) -> None:
    try:
        process.wait(patience_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise


def _close(process: "subprocess.Popen[str]") -> None:
    if process.stdin:
        process.stdin.close()


def _environment(jobs: int) -> Mapping[str, str]:
    """Return this process' environment with a share of the cores, unless the user has said how many threads to use."""
    threads = str(max(1, (cores() or 1) // jobs))
    return {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, **os.environ}


def stop_with_parent() -> None:
    """Interrupt this process when the one that started it is gone (its standard input ends)."""

    def watch() -> None:
        os.read(0, 1)  # not sys.stdin: its lock would outlive this thread
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
