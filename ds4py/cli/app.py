"""The door of the `ds4` command: runs it and turns every way it can end into an exit code.

0 done; 2 the user's input or file is at fault (one line on stderr); 1 ours; 130 interrupted.
Knows nothing of what the commands do. Imports next to nothing at the top: until `main` runs,
Ctrl-C is still answered by Python, with a traceback.
"""

from __future__ import annotations

import os
import sys

from ds4py.cli import interrupts

TYPE_CHECKING = False  # typing's own costs as much as the rest of this file
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import TextIO

TRACEBACK = "DS4_TRACEBACK"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `ds4` with the arguments (default: the process's own) and return its exit code.

    The process is expected to end afterwards: Ctrl-C is left to kill it.
    """
    interrupts.quit_quietly()
    _prepare_streams()
    try:
        code = _run(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = interrupts.EXIT_CODE
    except BrokenPipeError:
        code = 0  # the reader has what it wanted: `ds4 generate ... | head -1` is a success
        _abandon(sys.stdout)
    except Exception as error:
        code = _report(error)
    _flush_the_rest()
    interrupts.restore_default()  # from here on Ctrl-C ends the tear-down, without a traceback
    return code


def _run(arguments: Sequence[str]) -> int:
    from ds4py.cli.commands import app

    try:
        # Commands return their exit code; None is a command that has nothing to say about it.
        result = app(args=list(arguments), prog_name="ds4", standalone_mode=False)
    except SystemExit as stop:
        if isinstance(stop.__context__, BrokenPipeError):  # typer would make it exit code 1
            raise stop.__context__ from None
        raise
    return result if isinstance(result, int) else 0


def _report(error: Exception) -> int:
    """Say in one line on stderr what went wrong; the exit code it stands for."""
    code = getattr(error, "exit_code", 1)
    if os.environ.get(TRACEBACK):
        import traceback

        traceback.print_exception(error)
    import contextlib

    with contextlib.suppress(OSError, ValueError):  # perhaps there is nobody left to tell
        print(f"error: {_describe(error)}", file=sys.stderr, flush=True)
    return code if isinstance(code, int) else 1


def _describe(error: Exception) -> str:
    from ds4py.errors import DS4Error

    if isinstance(error, DS4Error):
        text = str(error)
    elif hasattr(error, "format_message"):  # wrong usage, found while the options were read
        text = f"{error.format_message().rstrip('.')}; {_help_hint(error)}"
    elif isinstance(error, MemoryError):
        text = "out of memory; choose a smaller --context or close other programs"
    else:
        text = f"unexpected {type(error).__name__}: {error}; {TRACEBACK}=1 shows where"
    return " ".join(text.split())


def _help_hint(error: Exception) -> str:
    command = getattr(getattr(error, "ctx", None), "command_path", "ds4")
    return f"see `{command} --help`"


def _prepare_streams() -> None:
    """Make stdin, stdout and stderr usable: open, and UTF-8 whatever the locale says."""
    for descriptor, stream in enumerate((sys.stdin, sys.stdout, sys.stderr)):
        if stream is None:  # closed by the caller (`>&-`): keep the number from a model file
            os.open(os.devnull, os.O_RDWR)
        elif descriptor and hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")
    # They live as long as the process does.
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")  # noqa: SIM115
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def _flush_the_rest() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            _abandon(stream)


def _abandon(stream: TextIO) -> None:
    """Send what is still buffered nowhere: Python flushes at exit and would complain again."""
    import contextlib

    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
