"""`ds4 pull`: fetch a model; progress on stderr, the model's directory on stdout.

Ctrl-C ends the process at once, as everywhere: what is on disk survives any kill.
"""

import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from ds4py.cli.settings import DEFAULT_MODEL, models_directory
from ds4py.cli.view import can_draw
from ds4py.errors import OptionsError
from ds4py.hub import manifest, place

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_LINE_EVERY_S = 10.0
_TITLES = {"download": "Fetching", "check": "Checking"}


def run(name: str, revision: str | None, to: str | None, token: str | None) -> int:
    """Fetch the model; the exit code."""
    if name == DEFAULT_MODEL:
        raise OptionsError(f"the model {name} is part of the program; there is nothing to pull")
    for option, value in (("--revision", revision), ("--to", to), ("--token", token)):
        if value is not None and not value.strip():
            raise OptionsError(f"{option} is empty; leave it out or give a value")
    wanted = manifest.choose(name)
    if revision is not None and revision != wanted.revision:
        # What is known by heart belongs to the revision it was noted for.
        wanted = replace(wanted, revision=revision, weight_bytes=0, sha256={})
    directory = Path(to).expanduser() if to else models_directory() / place.folder_name(name)

    from ds4py.hub.pull import pull

    # The library's warnings tell of what it will try next; what matters reaches us as an error.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    with PullProgress(sys.stderr) as progress:
        print(pull(wanted, directory.absolute(), token, progress))
    return 0


class PullProgress:
    """`progress(stage, done, total)`: a bar on a terminal, else a line now and then.

    A context manager: leaving it removes the bar.
    """

    def __init__(self, err: TextIO, clock: Callable[[], float] = monotonic) -> None:
        self._err, self._clock = err, clock
        self._drawn = err.isatty() and can_draw()
        self._stage = ""
        self._start = (0.0, 0)
        """When the stage began, and how much was done by then."""
        self._next_line = 0.0
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> "PullProgress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = self._clock()
        if stage != self._stage:
            self._stage, self._start, self._next_line = stage, (now, done), now
        if self._drawn:
            self._draw(done, total)
        elif now >= self._next_line and done < total:
            print(f"ds4: {self.line(done, total)}", file=self._err, flush=True)
            self._next_line = now + _LINE_EVERY_S

    def line(self, done: int, total: int) -> str:
        """`fetching: 34.5 GB of 159.6 GB, 85.2 MB/s, 25 min left`"""
        from ds4py.hub.pull import size

        start, before = self._start
        elapsed = self._clock() - start
        text = f"{_TITLES[self._stage].lower()}: {size(done)} of {size(total)}"
        if elapsed <= 0 or done <= before:
            return text
        rate = (done - before) / elapsed
        minutes, seconds = divmod(round((total - done) / rate), 60)
        left = f"{minutes} min" if minutes else f"{seconds} s"
        return f"{text}, {size(int(rate))}/s, {left} left"

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
            )
            self._task = self._bar.add_task("")
            self._bar.start()
        assert self._task is not None
        if self._bar.tasks[0].description != _TITLES[self._stage]:
            self._bar.reset(self._task, description=_TITLES[self._stage], completed=done)
        self._bar.update(self._task, completed=done, total=total, refresh=True)
