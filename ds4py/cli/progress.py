"""A bar on stderr for work that takes long enough to wonder: loading, reading a long prompt."""

from collections.abc import Callable
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from ds4py.cli.view import can_draw

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_PATIENCE_S = 0.5
_FRAME_S = 0.1
_TITLES = {
    "load": "Loading the model",
    "prefill": "Reading the prompt",
    "measure": "Measuring",
}


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

    def __enter__(self) -> "ProgressBar":
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
