"""Reading expert records: files, errors, checks, and the threads that do it.

A read lands in the record's slot directly, past the page cache, where address, offset and length
allow it, else through a buffer of the reading thread. Knows nothing of what the records mean.
"""

from __future__ import annotations

import contextlib
import fcntl
import heapq
import mmap
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from ds4py.errors import WeightsError
from ds4py.experts.policy import Key
from ds4py.formats.bundle import LayerRecords, Span

ALIGN = 4096
"""What direct reads need of address, offset and length, on every disk we know of."""
F_NOCACHE = getattr(fcntl, "F_NOCACHE", None)

ReadInto = Callable[[int, Sequence[Any], int], int]
"""`os.preadv`, or a test's stand-in: (descriptor, buffers, offset) -> bytes read."""


@dataclass
class RecordFile:
    """One open file and what it was when it was opened."""

    path: Path
    descriptor: int
    direct: bool
    """Whether reads pass the page cache by."""
    size: int
    modified_ns: int

    @staticmethod
    def open(path: Path) -> RecordFile:
        """Raises WeightsError."""
        try:
            descriptor, direct = _open_direct(path)
        except OSError as exc:
            raise WeightsError(f"{path} cannot be opened ({exc.strerror})") from exc
        found = os.fstat(descriptor)
        return RecordFile(path, descriptor, direct, found.st_size, found.st_mtime_ns)

    def unchanged(self) -> bool:
        """Whether the file is still as it was opened: not written to, not cut off."""
        now = os.fstat(self.descriptor)
        return (now.st_size, now.st_mtime_ns) == (self.size, self.modified_ns)


def _open_direct(path: Path) -> tuple[int, bool]:
    direct = getattr(os, "O_DIRECT", 0)
    if direct:
        with contextlib.suppress(OSError):  # some file systems have no direct reads
            return os.open(path, os.O_RDONLY | direct), True
    descriptor = os.open(path, os.O_RDONLY)
    if F_NOCACHE is not None:
        fcntl.fcntl(descriptor, F_NOCACHE, 1)
    return descriptor, False


class RecordReader:
    """Reads any record of a model into memory. Safe to call from several threads."""

    def __init__(
        self, layers: Mapping[int, LayerRecords], verify: str, read_into: ReadInto = os.preadv
    ):
        """verify: "first", "always" or "never". Raises WeightsError when a file cannot be opened.

        Files stay open: one replaced by another of the same name is read on as it was.
        """
        self._layers, self._verify = layers, verify
        self.read_into = read_into
        """What reads bytes; a test may put failures in its place."""
        paths = {span.file for records in layers.values() for span in records.spans}
        self._files = {path: RecordFile.open(path) for path in sorted(paths)}
        self._verified = {n: bytearray(records.n_experts) for n, records in layers.items()}
        self._local = threading.local()

    @property
    def direct(self) -> bool:
        """Whether all reads pass the page cache by."""
        return F_NOCACHE is not None or all(file.direct for file in self._files.values())

    def close(self) -> None:
        """Close the files; no read may be running."""
        for file in self._files.values():
            os.close(file.descriptor)
        self._files = {}

    def read(self, key: Key, into: memoryview) -> None:
        """Fill `into` with one record. Raises WeightsError: layer, expert, file, offset, fault."""
        records = self._layers[key.layer]
        for span in records.of(key.expert):
            file = self._files[span.file]
            try:
                n_read = self._read_span(file, span, into)
            except OSError as exc:
                raise _fault(key, span, f"cannot be read ({exc.strerror or exc})") from exc
            if n_read < span.n_bytes:
                raise _fault(key, span, f"ends after {n_read} of {span.n_bytes} bytes")
            if not file.unchanged():
                raise _fault(key, span, "was changed while it was in use")
        done = self._verified[key.layer]
        if self._verify == "always" or (self._verify == "first" and not done[key.expert]):
            fault = records.fault(key.expert, into)
            if fault is not None:
                raise _fault(key, *fault)
            done[key.expert] = 1

    def _read_span(self, file: RecordFile, span: Span, into: memoryview) -> int:
        """Bytes of the span that the file had."""
        target = into[span.at : span.at + span.n_bytes]
        aligned = not (_address(target) % ALIGN or span.offset % ALIGN or span.n_bytes % ALIGN)
        if not file.direct or aligned:
            n_read = self._fill(file.descriptor, target, span.offset)
            if not file.direct and F_NOCACHE is None and hasattr(os, "posix_fadvise"):
                advice = os.POSIX_FADV_DONTNEED
                os.posix_fadvise(file.descriptor, span.offset, span.n_bytes, advice)
            return n_read
        start, length = pages_of(span)
        bounce = self._bounce(length)
        skip = span.offset - start
        n_read = min(max(0, self._fill(file.descriptor, bounce, start) - skip), span.n_bytes)
        if n_read:  # by numpy, which lets other threads run meanwhile
            np.frombuffer(target, np.uint8)[:n_read] = np.frombuffer(bounce, np.uint8, n_read, skip)
        return n_read

    def _fill(self, descriptor: int, target: memoryview, offset: int) -> int:
        """Read until the target is full or the file ends."""
        n_read = 0
        while n_read < len(target):
            got = self.read_into(descriptor, [target[n_read:]], offset + n_read)
            if not got:
                break
            n_read += got
        return n_read

    def _bounce(self, n_bytes: int) -> memoryview:
        """This thread's aligned buffer."""
        buffer: memoryview | None = getattr(self._local, "buffer", None)
        if buffer is None or len(buffer) < n_bytes:
            buffer = self._local.buffer = memoryview(mmap.mmap(-1, n_bytes))
        return buffer[:n_bytes]


def pages_of(span: Span) -> tuple[int, int]:
    """Offset and length of the aligned part of the file that a span lies in."""
    start = span.offset // ALIGN * ALIGN
    return start, -(-(span.offset + span.n_bytes) // ALIGN) * ALIGN - start


def _address(view: memoryview) -> int:
    return np.frombuffer(view, np.uint8).ctypes.data


def _fault(key: Key, span: Span, what: str) -> WeightsError:
    return WeightsError(
        f"layer {key.layer}, expert {key.expert}: {span.file} at offset {span.offset} {what}; the "
        "file is damaged or was replaced, fetch or make the model again"
    )


DEMAND, AHEAD, BACKGROUND = range(3)
"""Urgency of a read: a layer waits for it, a layer soon will, or none may ever."""


@dataclass
class Load:
    """One record on its way into one slot."""

    key: Key
    into: memoryview
    urgency: int
    state: str = "queued"
    """"queued", "reading", "done", "failed" or "cancelled"."""
    error: BaseException | None = field(default=None, repr=False)

    @property
    def finished(self) -> bool:
        return self.state in ("done", "failed", "cancelled")


class Readers:
    """Threads that read records, the most urgent first, in the order they were asked for."""

    def __init__(self, read: Callable[[Key, memoryview], None], depth: int):
        """depth: reads in flight."""
        self._read, self.depth = read, depth
        self._queue: list[tuple[int, int, Load]] = []
        self._order = count()
        lock = threading.Lock()
        self._changed, self._finished = threading.Condition(lock), threading.Condition(lock)
        self._open = True
        self._threads = [
            threading.Thread(target=self._work, name=f"experts-{i}", daemon=True)
            for i in range(depth)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, key: Key, into: memoryview, urgency: int) -> Load:
        """Ask for a record."""
        load = Load(key, into, urgency)
        with self._changed:
            self._push(load)
        return load

    def hurry(self, load: Load, urgency: int = DEMAND) -> None:
        """Move a queued load forward."""
        with self._changed:
            if load.state == "queued" and urgency < load.urgency:
                load.urgency = urgency
                self._push(load)

    def cancel(self, load: Load) -> None:
        """Take a load back, or wait until it is through; afterwards its slot is free."""
        with self._changed:
            if load.state == "queued":
                load.state = "cancelled"
        self.wait([load])

    def wait(self, loads: Iterable[Load]) -> None:
        """Until all are finished, well or not."""
        with self._finished:
            for load in loads:
                while not load.finished:
                    self._finished.wait()

    def close(self) -> None:
        """End the threads; queued loads are cancelled."""
        with self._changed:
            self._open = False
            for _, _, load in self._queue:
                if load.state == "queued":
                    load.state = "cancelled"
            self._queue = []
            self._changed.notify_all()
            self._finished.notify_all()
        for thread in self._threads:
            thread.join()

    def _push(self, load: Load) -> None:
        heapq.heappush(self._queue, (load.urgency, next(self._order), load))
        self._changed.notify()

    def _next(self) -> Load | None:
        """The next load to read; None at the end."""
        with self._changed:
            while self._open:
                while self._queue:
                    load = heapq.heappop(self._queue)[2]
                    if load.state == "queued":  # else cancelled, or hurried and taken before
                        load.state = "reading"
                        return load
                self._changed.wait()
            return None

    def _work(self) -> None:
        while (load := self._next()) is not None:
            error: BaseException | None = None
            try:
                self._read(load.key, load.into)
            except BaseException as exc:  # belongs to whoever waits for the record
                error = exc
            with self._changed:
                load.error, load.state = error, "failed" if error else "done"
                self._finished.notify_all()
