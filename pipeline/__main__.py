"""The command `pipeline`: how it starts and how it ends. The commands themselves are in `commands.py`.

Exit codes: 0 done, 1 a bug (with its traceback), 2 a wrong config or wrong data, 3 a failed gate or proof, 130
interrupted.
"""

import errno
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec

_NEEDED = ("click", "pydantic", "yaml", "rich")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (by default this process') and return its exit code."""
    if not all(map(find_spec, _NEEDED)):
        print(
            "pipeline: training and export need the 'train' extra; pip install 'headstart[train,cpu]'", file=sys.stderr
        )
        return 2
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
    except BrokenPipeError:  # the reader, as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"pipeline: the disk is full; free some space and give the same command again ({error})", file=sys.stderr)
        return 2
    return code if isinstance(code, int) else 0


if __name__ == "__main__":
    sys.exit(main())
