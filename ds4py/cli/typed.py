"""Where a chat's messages come from: a terminal with line editing, or a pipe.

`read()` gives the next message, raises EOFError when there is none and KeyboardInterrupt on Ctrl-C.
"""

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol, TextIO

from ds4py.cli.settings import decode
from ds4py.cli.store import Store

if TYPE_CHECKING:
    from prompt_toolkit.key_binding import KeyBindings


class Source(Protocol):
    """Gives messages one after the other."""

    interactive: bool

    def read(self) -> str: ...


class Pipe:
    """One message per line, empty ones skipped. Raises PromptError on text that is no UTF-8."""

    interactive = False

    def __init__(self, stdin: TextIO) -> None:
        self._lines = enumerate(stdin.buffer, 1)

    def read(self) -> str:
        for number, line in self._lines:
            if text := decode(line, f"line {number} of stdin").strip():
                return text
        raise EOFError


class Terminal:
    """Line editing with history. Enter sends; Alt-Enter or a backslash before Enter goes on."""

    interactive = True

    def __init__(self, store: Store) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.history import FileHistory, History, InMemoryHistory
        from prompt_toolkit.output import create_output

        history: History
        try:
            history = FileHistory(str(store.history_file()))
        except OSError as error:
            print(f"ds4: no history: {error.strerror or error}", file=sys.stderr)
            history = InMemoryHistory()
        # The prompt is not part of the answer: it is drawn on stderr when that is a terminal.
        out = sys.stderr if sys.stderr.isatty() else sys.stdout
        self._session: PromptSession[str] = PromptSession(
            message="> ",
            prompt_continuation="  ",
            multiline=True,
            enable_suspend=True,
            key_bindings=bindings(),
            history=history,
            output=create_output(stdout=out),
        )

    def read(self) -> str:
        return self._session.prompt().strip()


@contextlib.contextmanager
def silent_keyboard(stdin: TextIO) -> Iterator[None]:
    """Inside, what is typed waits unseen for the next prompt instead of landing in the answer.

    Ctrl-C works as before. Does nothing where stdin is no terminal.
    """
    if not stdin.isatty():
        yield
        return
    import termios

    before = termios.tcgetattr(stdin)
    silent = [*before]
    silent[3] = before[3] & ~termios.ECHO
    termios.tcsetattr(stdin, termios.TCSADRAIN, silent)
    try:
        yield
    finally:
        termios.tcsetattr(stdin, termios.TCSADRAIN, before)


def bindings() -> "KeyBindings":
    """Enter sends, unless the line ends in a backslash; Alt-Enter starts a new line."""
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("enter")
    def send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    return keys
