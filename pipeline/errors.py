"""The errors a user can meet, each with the exit code it ends the command with.

Every message reads `where: what is wrong, what was given; what would do`. Anything that is not a `PipelineError` is a
bug: it keeps its traceback and the command exits with 1.
"""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


class PipelineError(Exception):
    """Something went wrong that is not a bug of the program: shown without a traceback."""

    exit_code = 1
    node = ""  # the engine sets it to the node whose stage raised


class UserError(PipelineError):
    """The config is wrong, or the data it names is missing or wrong (exit code 2)."""

    exit_code = 2


class ConfigError(UserError):
    """Everything that is wrong with a config, at once.

    `problems` holds one line a problem; the message is those lines.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


class VerdictError(PipelineError):
    """A proof, a parity check or a gate failed (exit code 3); the stage that raises it publishes nothing."""

    exit_code = 3


class Waiting(PipelineError):
    """Work for another machine is not done yet (exit code 4); the same command goes on when it is."""

    exit_code = 4


class Interrupted(PipelineError):
    """Ctrl-C or SIGTERM (exit code 130); what a stage has saved stays and the same command continues."""

    exit_code = 130


def closest(given: str, known: Iterable[str]) -> str | None:
    """Return the known name that is close to the given one, if any."""
    return next(iter(get_close_matches(given, list(known), n=1, cutoff=0.6)), None)


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` when a known name is close to the given one, or the known names, or nothing."""
    names = list(known)
    close = closest(given, names)
    if close is not None:
        return f"; did you mean '{close}'?"
    return f"; there are: {', '.join(names)}" if names else ""
