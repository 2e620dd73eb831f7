"""What Ctrl-C does. There are two answers, and Python's own KeyboardInterrupt is neither.

An exception raised between any two bytecodes can be swallowed by a C extension that is being
imported, or leave half an update behind. So a command that has nothing to save leaves at once
(`quit_quietly`), and a chat asks between two tokens whether it should stop (`Stoppable`).

All of it is for the main thread. Imported before anything else, so it imports next to nothing.
"""

from __future__ import annotations

import os
import signal
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType, TracebackType

EXIT_CODE = 130
_SHOW_CURSOR = b"\x1b[?25h\n"


def quit_quietly() -> None:
    """From now on Ctrl-C ends the process with 130: no traceback, nothing left half done.

    Must not be in force while a file is being written in place. Does nothing where the caller has
    SIGINT ignored (nohup, a background job).
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


class Stoppable:
    """Inside this context the first Ctrl-C is only noted; `stopped()` tells whether it came.

    A second one raises KeyboardInterrupt, for work that never asks. The handler of before is
    back in force afterwards.
    """

    def __init__(self) -> None:
        self._noted = False

    def stopped(self) -> bool:
        return self._noted

    def __enter__(self) -> Stoppable:
        self._ours = _is_ours()
        if self._ours:
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._ours:
            signal.signal(signal.SIGINT, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._noted:
            raise KeyboardInterrupt
        self._noted = True


def _is_ours() -> bool:
    return signal.getsignal(signal.SIGINT) != signal.SIG_IGN


def _leave(number: int, frame: FrameType | None) -> None:
    # Not sys.exit: an exception could be caught, and interpreter tear-down could print.
    if sys.stderr is not None and os.isatty(2):
        os.write(2, _SHOW_CURSOR)  # a progress bar may have hidden it
    os._exit(EXIT_CODE)
