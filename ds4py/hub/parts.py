"""One file while it is being fetched: what of it is on disk survives any kill.

The file is cut into parts that are fetched independently. Beside its data lies a table of one
64-bit number for each part: how many of its bytes are there. A number is written after the bytes
it counts, so that a process killed between the two writes only fetches those bytes again. When the
hash of the whole file is right, the table becomes a `.done` file and the data moves to its place.

The names of the three hold the file's hash: bytes of another version are never mistaken for this
one's. Power may fail in an order of its own; then the hash at the end finds out.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from array import array
from collections.abc import Callable
from pathlib import Path

from ds4py.hub.place import FileRecord

PART_BYTES = 64 << 20
"""Large enough that asking for a part costs little, small enough that 8 at once keep busy."""
_READ_BYTES = 4 << 20


class PartialFile:
    """The parts of one file. Different parts may be written by different threads."""

    def __init__(self, root: Path, notes: Path, file: FileRecord, part_bytes: int = PART_BYTES):
        """`file` belongs at `root / file.path`; what is unfinished stays in `notes`."""
        self.file, self.part_bytes = file, part_bytes
        self.final = root / file.path
        identity = f"{file.path} {file.size} {file.sha256 or file.git_sha1} {part_bytes}"
        key = hashlib.sha256(identity.encode()).hexdigest()[:32]
        self.data, self.table, self.done = (notes / f"{key}.{s}" for s in ("data", "parts", "done"))
        self.n_parts = max(1, -(-file.size // part_bytes))
        self._lock = threading.Lock()
        self._counts = array("Q", [0]) * self.n_parts
        self._open = 0

    def recover(self) -> bool:
        """Take over what an earlier run left. Whether the file is complete, checked, in place."""
        if self.done.exists():
            if self.data.exists():
                self._move()
            if self.final.is_file() and self.final.stat().st_size == self.file.size:
                return True
            self.done.unlink()
        if not self._recover_parts():
            self.restart()
        return False

    def _recover_parts(self) -> bool:
        try:
            counts = array("Q", self.table.read_bytes())
            there = self.data.stat().st_size
        except (OSError, ValueError):
            return False
        if len(counts) != self.n_parts:
            return False
        for part, count in enumerate(counts):
            if count > self.length(part) or (count and part * self.part_bytes + count > there):
                return False
        self._counts = counts
        return True

    def restart(self) -> None:
        """Forget all bytes. Raises OSError."""
        self.table.unlink(missing_ok=True)
        self.data.unlink(missing_ok=True)  # it may be a link to somebody else's file
        self.data.touch()  # grows as parts come: some disks would fill the whole file with zeros
        self._counts = array("Q", [0]) * self.n_parts
        self.table.write_bytes(self._counts.tobytes())

    def adopt(self, source: Path) -> None:
        """Take all bytes from a file on this machine, without a copy where one disk holds both.

        The hash is checked as if they had been fetched. Raises OSError.
        """
        self.table.unlink(missing_ok=True)
        self.data.unlink(missing_ok=True)
        real = source.resolve()
        try:
            os.link(real, self.data)
        except OSError:
            shutil.copyfile(real, self.data)
        self._counts = array("Q", [self.length(part) for part in range(self.n_parts)])

    def length(self, part: int) -> int:
        """Bytes of a part."""
        return min(self.part_bytes, self.file.size - part * self.part_bytes)

    def missing(self, part: int) -> int:
        """Bytes of a part that are still to come."""
        return self.length(part) - self._counts[part]

    @property
    def n_bytes(self) -> int:
        """Bytes that are there."""
        return sum(self._counts)

    def next_byte(self, part: int) -> int:
        """The place in the file of the part's first missing byte."""
        return part * self.part_bytes + self._counts[part]

    def write(self, part: int, data: bytes) -> int:
        """Append to a part what belongs to it; how many bytes that were. Raises OSError."""
        data = data[: self.missing(part)]
        with open(self.data, "r+b", buffering=0) as stream:
            _write_all(stream.fileno(), data, self.next_byte(part))
        self._counts[part] += len(data)
        with open(self.table, "r+b", buffering=0) as stream:
            _write_all(stream.fileno(), array("Q", [self._counts[part]]).tobytes(), part * 8)
        return len(data)

    def pending(self) -> list[int]:
        """The parts to fetch; one of them at least, because the last one done checks the file."""
        parts = [part for part in range(self.n_parts) if self.missing(part)] or [0]
        self._open = len(parts)
        return parts

    def finish_part(self) -> bool:
        """Say that a pending part is complete; whether it was the last one."""
        with self._lock:
            self._open -= 1
            return self._open == 0

    def check(self, progress: Callable[[int], None]) -> bool:
        """Hash the data; if it is right, put it in its place. `progress` gets bytes read.

        Raises OSError.
        """
        if self.data.stat().st_size != self.file.size:
            return False
        if self.file.sha256:
            digest, expected = hashlib.sha256(), self.file.sha256
        else:
            digest = hashlib.sha1(f"blob {self.file.size}\0".encode(), usedforsecurity=False)
            expected = self.file.git_sha1 or ""
        with open(self.data, "rb", buffering=0) as stream:
            while block := stream.read(_READ_BYTES):
                digest.update(block)
                progress(len(block))
            os.fsync(stream.fileno())
        if digest.hexdigest() != expected:
            return False
        if self.table.exists():
            self.table.replace(self.done)
        else:
            self.done.touch()
        self._move()
        return True

    def _move(self) -> None:
        self.final.parent.mkdir(parents=True, exist_ok=True)
        self.data.replace(self.final)


def _write_all(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
