"""Threads that fetch the missing parts of files and check each file when its last part is in.

Knows the source only as something that reads a range of bytes, and may hiccup.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Protocol

from ds4py.errors import PullError
from ds4py.hub.parts import PartialFile
from ds4py.hub.place import FileRecord

Progress = Callable[[str, int, int], None]
"""Called with (stage, bytes done, bytes in all); the stages are "download" and "check"."""

N_THREADS = 8
TRIES = 6
"""How often in a row a part may fail without one byte of progress."""
_FIRST_WAIT_S, _LONGEST_WAIT_S = 1.0, 30.0
_REPORT_S = 0.2


class Hiccup(Exception):
    """A transfer stopped in a way that may pass: worth another try, after `wait_s` at least."""

    def __init__(self, message: str, wait_s: float = 0.0):
        super().__init__(message)
        self.wait_s = wait_s


class Source(Protocol):
    """Where bytes come from."""

    def read(self, file: FileRecord, start: int, stop: int) -> Iterator[bytes]:
        """Bytes `start` to `stop`, in pieces. Raises PullError, Hiccup."""
        ...


class Crew:
    """Fetches files until all are checked and in their places."""

    def __init__(self, source: Source, files: Iterable[PartialFile], first_wait_s: float = -1.0):
        self._source, self._files = source, list(files)
        self._first_wait_s = _FIRST_WAIT_S if first_wait_s < 0 else first_wait_s
        self._jobs = deque((file, part) for file in self._files for part in file.pending())
        self._refused: set[PartialFile] = set()
        """Files whose hash was wrong once."""
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._received = sum(file.n_bytes for file in self._files)
        self._checked = 0

    def run(self, progress: Progress) -> None:
        """Raises PullError, OSError. All that has arrived is kept, whatever happens."""
        total = sum(file.file.size for file in self._files)
        with ThreadPoolExecutor(N_THREADS, "pull") as threads:
            try:
                left = {threads.submit(self._work) for _ in range(N_THREADS)}
                while left:
                    done, left = wait(left, _REPORT_S, FIRST_EXCEPTION)
                    for future in done:
                        future.result()
                    if self._received < total:
                        progress("download", self._received, total)
                    else:
                        progress("check", self._checked, total)
            finally:
                self._stop.set()

    def _work(self) -> None:
        while (job := self._next()) is not None:
            file, part = job
            self._fetch(file, part)
            if file.finish_part():
                self._check(file)

    def _next(self) -> tuple[PartialFile, int] | None:
        with self._lock:
            return self._jobs.popleft() if self._jobs and not self._stop.is_set() else None

    def _fetch(self, file: PartialFile, part: int) -> None:
        """All missing bytes of one part, however often the transfer breaks."""
        failures = 0
        while (missing := file.missing(part)) and not self._stop.is_set():
            start = file.next_byte(part)
            try:
                for data in self._source.read(file.file, start, start + missing):
                    self._count(file.write(part, data))
                    if self._stop.is_set():
                        return
            except Hiccup as error:
                failures = 1 if file.missing(part) < missing else failures + 1
                if failures == TRIES:
                    raise PullError(
                        f"{error}; what has arrived is kept, try again later"
                    ) from error
                # The first break after some progress is not waited for.
                pause = min(self._first_wait_s * (2 ** (failures - 1) - 1), _LONGEST_WAIT_S)
                self._stop.wait(max(pause, error.wait_s))

    def _check(self, file: PartialFile) -> None:
        """Put a complete file in its place; one that is wrong is fetched once more."""
        if self._stop.is_set() or file.check(self._count_checked):
            return
        self._count(-file.n_bytes)
        self._count_checked(-file.file.size)
        file.restart()
        if file in self._refused:
            raise PullError(
                f"{file.file.path} arrived damaged twice (its hash is not the one listed); it was "
                "thrown away, the rest is kept: try again later"
            )
        self._refused.add(file)
        with self._lock:
            self._jobs.extend((file, part) for part in file.pending())

    def _count(self, n_bytes: int) -> None:
        with self._lock:
            self._received += n_bytes

    def _count_checked(self, n_bytes: int) -> None:
        if self._stop.is_set():
            raise PullError("stopped")  # another thread failed, and says why
        with self._lock:
            self._checked += n_bytes
