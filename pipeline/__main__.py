"""The command `pipeline`: how it starts and how it ends. The commands themselves are in `commands.py`.

Exit codes: 0 done, 1 a bug (with its traceback), 2 a wrong config or wrong data, 3 a failed gate or proof, 4 work waits
to be carried to another machine, 130 interrupted.
"""

import errno
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec

_NEEDED = ("click", "pydantic", "yaml", "rich")
_OURS = ("pipeline", "stages", "deploy")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (by default this process') and return its exit code."""
    missing = [name for name in _NEEDED if not find_spec(name)]
    if missing:
        return _needs_extra(*missing)
    import click

    from pipeline.commands import pipeline
    from pipeline.errors import PipelineError

    try:
        code = pipeline.main(arguments, prog_name="pipeline", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort:
        print("pipeline: interrupted", file=sys.stderr)
        return 130
    except PipelineError as error:
        print(f"{error.node}: {error}" if error.node else str(error), file=sys.stderr)
        return error.exit_code
    except ModuleNotFoundError as error:
        missing_name = (error.name or "").partition(".")[0]
        if not missing_name or missing_name in _OURS or find_spec(missing_name):
            raise  # a bug: what is missing is a part of ours, or of what is installed
        return _needs_extra(missing_name)
    except BrokenPipeError:  # the reader, as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"pipeline: the disk is full; free some space and give the same command again ({error})", file=sys.stderr)
        return 2
    return code if isinstance(code, int) else 0


def _needs_extra(*missing: str) -> int:
    print(
        f"pipeline: {', '.join(missing)} not installed, and training and export need the 'train' extra; "
        "in a copy of the repository: pip install '.[train,cpu]'",
        file=sys.stderr,
    )
    return 2


if __name__ == "__main__":
    sys.exit(main())
