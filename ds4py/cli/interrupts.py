"""What Ctrl-C does. There are two answers, and Python's own KeyboardInterrupt is neither.

An exception raised between any two bytecodes can be swallowed by a C extension that is being
imported, or leave half an update behind. So a command that has nothing to save leaves at once
(`quit_quietly`), and a chat asks between two tokens whether it should stop (`stoppable`).
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

EXIT_CODE = 130
_SHOW_CURSOR = b"\x1b[?25h\n"


def quit_quietly() -> None:
    """From now on Ctrl-C ends the process with 130: no traceback, nothing left half done.

    Must not be in force while a file is being written in place. Does nothing where SIGINT is
    ignored by the caller (nohup, a background job) or outside the main thread.
    """
    if _is_ours():
        signal.signal(signal.SIGINT, _leave)


def restore_default() -> None:
    """From now on Ctrl-C kills the process, without Python noticing."""
    if _is_ours():
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def raise_keyboard_interrupt() -> None:
    """From now on Ctrl-C raises KeyboardInterrupt, as in any Python program."""
    if _is_ours():
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def stoppable() -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C is only noted; the yielded function tells whether it came.

    A second one raises KeyboardInterrupt, for work that never asks. The handler of before is
    back in force afterwards.
    """
    noted = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal noted
        if noted:
            raise KeyboardInterrupt
        noted = True

    if not _is_ours():
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: noted
    finally:
        signal.signal(signal.SIGINT, before)


def _is_ours() -> bool:
    return (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) != signal.SIG_IGN
    )


def _leave(number: int, frame: FrameType | None) -> None:
    # Not sys.exit: an exception could be caught, and interpreter tear-down could print.
    if sys.stderr is not None and os.isatty(2):
        os.write(2, _SHOW_CURSOR)  # a progress bar may have hidden it
    os._exit(EXIT_CODE)
