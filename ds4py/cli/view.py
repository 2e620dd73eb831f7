"""Draws an answer while it is written. Gets events, knows nothing of where they come from.

Content goes to stdout. Reasoning is for people only: dimmed, and on stderr, or nowhere when that
is not a terminal, so that stdout is the answer alone.
"""

import os
from collections.abc import Mapping
from typing import Protocol, TextIO

from ds4py.text.events import Content, Event, Reasoning

_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"
# A model's text must not drive the terminal: all control characters but newline and tab.
_UNSAFE = {code: None for code in [*range(32), *range(127, 160)] if chr(code) not in "\n\t"}


class View(Protocol):
    """What an answer is drawn on."""

    def event(self, event: Event) -> None: ...
    def end(self) -> None: ...


class SilentView:
    """Draws nothing: the answer is reported in another form."""

    def event(self, event: Event) -> None:
        pass

    def end(self) -> None:
        pass


class PlainView:
    """The answer's text on `out`, byte for byte when that is no terminal."""

    def __init__(self, out: TextIO, err: TextIO) -> None:
        self._out = Ink(out)
        self._reasoning = ReasoningView(err)
        self._at_line_start = True

    def event(self, event: Event) -> None:
        if isinstance(event, Reasoning):
            self._reasoning.write(event.text)
        elif isinstance(event, Content) and event.text:
            self._reasoning.end()
            self._out.write(event.text)
            self._at_line_start = event.text.endswith("\n")

    def end(self) -> None:
        """The answer is complete: finish its last line."""
        self._reasoning.end()
        if not self._at_line_start:
            self._out.write("\n")
        self._at_line_start = True


class ReasoningView:
    """Dimmed text, when there is a terminal to show it on."""

    def __init__(self, err: TextIO) -> None:
        self._ink = Ink(err, dim=True)
        self._shown = err.isatty()
        self._open = False

    def write(self, text: str) -> None:
        if self._shown and (text := text if self._open else text.lstrip("\n")):
            self._ink.write(text)
            self._open = True

    def end(self) -> None:
        """Leave a blank line between the reasoning and what follows."""
        if self._open:
            self._ink.write("\n\n")
        self._open = False


class Ink:
    """Writes at once; on a terminal without control characters, dimmed where that is wanted."""

    def __init__(self, stream: TextIO, dim: bool = False) -> None:
        self._stream = stream
        self._terminal = stream.isatty()
        self._dim = dim and has_colour(stream)

    def write(self, text: str) -> None:
        if self._terminal:
            text = harmless(text)
        if self._dim:
            text = f"{_DIM}{text}{_PLAIN}"
        self._stream.write(text)
        self._stream.flush()


def harmless(text: str) -> str:
    """The text without characters that move the cursor or change the terminal."""
    return text.translate(_UNSAFE)


def has_colour(stream: TextIO, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether escape codes are welcome: a terminal, not a dumb one, and no NO_COLOR."""
    return stream.isatty() and can_draw(environ) and not environ.get("NO_COLOR")


def can_draw(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a terminal of this kind can move its cursor."""
    return environ.get("TERM", "dumb") not in ("dumb", "unknown", "")
