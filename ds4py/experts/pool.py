"""The memory expert records live in: one region of equal slots, allocated once.

A slot is FREE (holds nothing), LOADING (a read is on its way into it) or READY. What a slot holds
is noted only after its read succeeded: whatever is interrupted, a record is never taken for
another. Who may have which slot is decided elsewhere; a slot that a running evaluation may read
must not be given to `fetch` for another record.
"""

from __future__ import annotations

from collections.abc import Iterable

from ds4py.experts.policy import Key
from ds4py.experts.reader import Load, Readers
from ds4py.kernels.ops import Array

FREE, LOADING, READY = "free", "loading", "ready"


class Pool:
    """Slots of `record_bytes` each over memory that the kernels read as `records`."""

    def __init__(self, records: Array, view: memoryview, readers: Readers):
        """records: uint8 [slots, record_bytes]; view: the same bytes, writable."""
        self.records, self.readers = records, readers
        self.n_slots, self.record_bytes = records.shape
        size = self.record_bytes
        self._views = [view[slot * size : (slot + 1) * size] for slot in range(self.n_slots)]
        self._content: list[Key | None] = [None] * self.n_slots
        self._loads: list[Load | None] = [None] * self.n_slots

    def state(self, slot: int) -> str:
        """FREE, LOADING or READY."""
        load = self._loads[slot]
        if load is not None:
            return LOADING if not load.finished else READY if load.state == "done" else FREE
        return READY if self._content[slot] is not None else FREE

    def holds(self, slot: int, key: Key) -> bool:
        """Whether the record is there, read and checked."""
        load = self._loads[slot]
        if load is not None:
            return load.key == key and load.state == "done"
        return self._content[slot] == key

    def fetch(self, slot: int, key: Key, urgency: int) -> bool:
        """See to it that the slot will hold the record; True when a new read was needed."""
        load = self._loads[slot]
        if load is not None:
            if load.key == key and load.state in ("queued", "reading", "done"):
                self.readers.hurry(load, urgency)
                return False
            self.readers.cancel(load)
            self._settle(slot, load)
        if self._content[slot] == key:
            return False
        self._content[slot] = None
        self._loads[slot] = self.readers.submit(key, self._views[slot], urgency)
        return True

    def wait(self, slots: Iterable[int]) -> None:
        """Until the reads into these slots are done. Raises the first one's error."""
        loads = [(slot, load) for slot in slots if (load := self._loads[slot]) is not None]
        self.readers.wait(load for _, load in loads)
        for slot, load in loads:
            self._settle(slot, load)
        for _, load in loads:
            if load.error is not None:
                raise load.error

    def copy(self, source: int, target: int, key: Key) -> None:
        """Take a record over from another slot, which must be READY."""
        assert self.holds(source, key)
        self.drop(target)
        self._views[target][:] = self._views[source]
        self._content[target] = key

    def drop(self, slot: int) -> None:
        """Make a slot FREE; a read on its way is cancelled or waited for."""
        load = self._loads[slot]
        if load is not None:
            self.readers.cancel(load)
            self._loads[slot] = None
        self._content[slot] = None

    def settled(self) -> dict[int, Key]:
        """What every READY slot holds, after all reads have ended; errors are dropped."""
        for slot, load in enumerate(self._loads):
            if load is not None:
                self.readers.cancel(load)
                self._settle(slot, load)
        return {slot: key for slot, key in enumerate(self._content) if key is not None}

    def _settle(self, slot: int, load: Load) -> None:
        """Note the outcome of a finished read."""
        self._content[slot] = load.key if load.state == "done" else None
        self._loads[slot] = None
