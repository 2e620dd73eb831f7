"""Markdown on a terminal while it is still being written.

A block (paragraph, list, fenced code) that is complete is rendered once, into the scroll-back, and
never touched again. Only the block under the pen is redrawn, and of it no more than fits on the
screen, so nothing is drawn twice however long it grows. Used where stdout is a terminal.
"""

import re
from time import monotonic
from typing import TYPE_CHECKING, TextIO

from ds4py.cli.view import ReasoningView, harmless
from ds4py.text.events import Content, Event, Reasoning

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.live import Live
    from rich.segment import Segment

_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
_ITEM = re.compile(r"(?:[-*+]|\d{1,9}[.)])(?:\s|$)")
_MARKER_CHARS = 11
"""A longer line shows whether it goes on with a list, though it is still being written."""
_FRAME_S = 0.08
"""Shortest time between two drawings of the same block."""


def split_blocks(text: str) -> tuple[list[str], str]:
    """Complete blocks, and the rest that may still grow.

    A block ends at a blank line whose next line starts at the margin, is complete, and does not go
    on with the same list; never inside a code fence. So what is cut off would be rendered the
    same with everything that follows.
    """
    lines = text.split("\n")
    blocks: list[str] = []
    start, fence, blank = 0, "", False
    settled = lines if len(lines[-1]) > _MARKER_CHARS else lines[:-1]
    for number, line in enumerate(settled):
        mark = _FENCE.match(line)
        if fence:
            if mark and line.strip() == mark[1] and mark[1].startswith(fence):
                fence = ""
            continue
        if blank and line[:1].strip() and not _same_list(lines[start], line):
            blocks.append("\n".join(lines[start:number]).strip("\n"))
            start = number
        if mark:
            fence = mark[1]
        blank = not line.strip()
        if blank and start == number:
            start += 1
    return blocks, "\n".join(lines[start:])


def _same_list(first: str, line: str) -> bool:
    return bool(_ITEM.match(first) and _ITEM.match(line))


class MarkdownView:
    """Renders the answer on a terminal, its reasoning dimmed above it."""

    def __init__(self, out: TextIO, err: TextIO, console: "Console | None" = None) -> None:
        from rich.console import Console

        self._console = console or Console(file=out)
        self._reasoning = ReasoningView(err)
        self._live: Live | None = None
        self._rest = ""
        self._printed = False
        self._next_frame = 0.0

    def event(self, event: Event) -> None:
        if isinstance(event, Reasoning):
            self._reasoning.write(event.text)
        elif isinstance(event, Content) and event.text:
            self._reasoning.end()
            self._rest += harmless(event.text)
            blocks, self._rest = split_blocks(self._rest)
            for block in blocks:
                self._print(block)
            self._draw()

    def end(self) -> None:
        """The answer is complete: its last block is, too."""
        self._reasoning.end()
        self._erase()
        if self._rest.strip():
            self._print(self._rest)
        self._rest, self._printed = "", False

    def _print(self, block: str) -> None:
        self._erase()
        self._console.print(Lines(block, gap=self._printed), end="")
        self._printed = True

    def _draw(self) -> None:
        from rich.live import Live

        now = monotonic()
        if not self._rest.strip() or now < self._next_frame:
            return
        if self._live is None:
            self._live = Live(
                console=self._console,
                auto_refresh=False,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._live.start()
        # One line for the end of what stands above, one for the cursor.
        most = max(self._console.height - 2, 1)
        self._live.update(Lines(self._rest, self._printed, most), refresh=True)
        # A long code block takes a while to colour: never spend most of the time drawing.
        self._next_frame = now + max(_FRAME_S, 4 * (monotonic() - now))

    def _erase(self) -> None:
        if self._live is not None:
            self._live.update("", refresh=True)
            self._live.stop()
            self._live = None
            self._next_frame = 0.0


class Lines:
    """Rendered Markdown without blank lines around it; of many lines, the last `most`."""

    def __init__(self, text: str, gap: bool, most: int | None = None) -> None:
        self._text = text
        self._gap = gap
        self._most = most

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        from rich.markdown import Markdown
        from rich.segment import Segment

        lines = console.render_lines(Markdown(self._text), options, pad=False)
        while lines and _is_blank(lines[-1]):
            lines.pop()
        while lines and _is_blank(lines[0]):
            lines.pop(0)
        if self._gap:
            lines.insert(0, [])
        for line in lines[-self._most :] if self._most else lines:
            yield from line
            yield Segment.line()


def _is_blank(line: "list[Segment]") -> bool:
    return not any(part.text.strip() or (part.style and part.style.bgcolor) for part in line)
