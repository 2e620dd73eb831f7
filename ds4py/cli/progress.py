"""A bar on stderr for work that takes long enough to wonder: loading, reading a long prompt."""

from collections.abc import Callable
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

from ds4py.cli.view import can_draw
from ds4py.sizes import format_size

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_PATIENCE_S = 0.5
_FRAME_S = 0.1
_TITLES = {
    "load": "Loading the model",
    "prefill": "Reading the prompt",
    "measure": "Measuring",
    "imatrix": "Reading the corpus",
}
_BYTE_TITLES = {"download": "Fetching", "check": "Checking", "quantize": "Quantising"}
_LINE_EVERY_S = 10.0


class ProgressBar:
    """`bar(stage, done, total)` draws, when stderr is a terminal and it has taken a while.

    A context manager: leaving it removes what is drawn.
    """

    def __init__(self, err: TextIO, clock: Callable[[], float] = monotonic) -> None:
        self._err = err
        self._clock = clock
        self._shown = err.isatty() and can_draw()
        self._stage = ""
        self._since = 0.0
        self._next_frame = 0.0
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if not self._shown:
            return
        now = self._clock()
        if stage != self._stage:
            self.close()
            self._stage, self._since = stage, now
        if done >= total:
            self.close()
        elif now - self._since > _PATIENCE_S and now > self._next_frame:
            self._draw(done, total)
            self._next_frame = now + _FRAME_S

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()
        self._bar = None
        self._stage = ""

    def _draw(self, done: int, total: int) -> None:
        if self._bar is None:
            from rich.console import Console
            from rich.progress import Progress

            console = Console(file=self._err, stderr=True)
            self._bar = Progress(console=console, auto_refresh=False, transient=True)
            self._task = self._bar.add_task(_TITLES.get(self._stage, self._stage))
            self._bar.start()
        assert self._task is not None
        self._bar.update(self._task, completed=done, total=total, refresh=True)


class ByteProgress(ProgressBar):
    """`progress(stage, done, total)` in bytes, for work of minutes to hours: a bar with rate and
    time left on a terminal, else a line now and then."""

    def __init__(self, err: TextIO, clock: Callable[[], float] = monotonic) -> None:
        super().__init__(err, clock)
        self._start = (0.0, 0)
        """When the stage began, and how much was done by then."""
        self._next_line = 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = self._clock()
        if stage != self._stage:
            self._stage, self._start, self._next_line = stage, (now, done), now
        if self._shown:
            self._draw(done, total)
        elif now >= self._next_line and done < total:
            print(f"ds4: {self.line(done, total)}", file=self._err, flush=True)
            self._next_line = now + _LINE_EVERY_S

    def line(self, done: int, total: int) -> str:
        """`fetching: 34.5 GB of 159.6 GB, 85.2 MB/s, 25 min left`"""
        start, before = self._start
        elapsed = self._clock() - start
        text = f"{_BYTE_TITLES[self._stage].lower()}: {format_size(done)} of {format_size(total)}"
        if elapsed <= 0 or done <= before:
            return text
        rate = (done - before) / elapsed
        minutes, seconds = divmod(round((total - done) / rate), 60)
        left = f"{minutes} min" if minutes else f"{seconds} s"
        return f"{text}, {format_size(rate)}/s, {left} left"

    def _draw(self, done: int, total: int) -> None:
        if self._bar is None:
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                DownloadColumn,
                Progress,
                TextColumn,
                TimeRemainingColumn,
                TransferSpeedColumn,
            )

            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
                console=Console(file=self._err, stderr=True),
                auto_refresh=False,
                transient=True,
                redirect_stdout=False,  # results belong there, whatever is drawn on stderr
                redirect_stderr=False,
            )
            self._task = self._bar.add_task(_BYTE_TITLES[self._stage], total=total)
            self._bar.start()
        assert self._task is not None
        if self._bar.tasks[0].description != _BYTE_TITLES[self._stage]:
            self._bar.reset(self._task, description=_BYTE_TITLES[self._stage], completed=done)
        self._bar.update(self._task, completed=done, total=total, refresh=True)
