"""The layers whose records have one size, their slots, and getting records into them.

A section's slots are the cache, which `Residency` manages, and behind it a few for staging: records
that are read for one step only. During a prefill nearly all experts of a layer are needed once;
they pass through the staging slots in ascending order, read while the ones before are computed
with, and the cache keeps what decoding needs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from time import perf_counter

from ds4py.experts.policy import Key, Placement, Policy, Residency
from ds4py.experts.pool import Pool
from ds4py.experts.reader import AHEAD, BACKGROUND, DEMAND, Readers
from ds4py.kernels.ops import Array

STAGING = 16
"""Slots for records that do not stay, at most; half of them are computed with at a time."""
DECODED = 4
"""Experts decoded at a time, at most, where decoding takes memory of its own."""


@dataclass
class Reads:
    """Records read, and what became of those read ahead of their layer."""

    records: int = 0
    useful: int = 0
    """Read ahead and there in time."""
    late: int = 0
    """Read ahead, but the layer had to wait."""
    wasted: int = 0
    """Read ahead for nothing."""


@dataclass(frozen=True)
class Batch:
    """Experts whose records are in memory now."""

    slots: Mapping[int, int]
    passing: bool
    """The slots are given to others when the next batch is asked for."""


class Section:
    """Cache and staging slots of some layers."""

    def __init__(
        self,
        layers: Sequence[int],
        minimum: int,
        policy: Policy,
        n_staging: int,
        records: Array,
        view: memoryview,
        readers: Readers,
    ):
        """records: uint8 [cache + staging slots, record_bytes]; view: the same bytes.

        minimum: slots each layer is sure of.
        """
        self.layers = tuple(layers)
        self.pool = Pool(records, view, readers)
        self.n_cached = self.pool.n_slots - n_staging
        self.residency = Residency(self.n_cached, layers, minimum, policy)
        self.reads = Reads()
        self.stall_s = 0.0
        """Time spent waiting for reads."""
        self._staging = list(range(self.n_cached, self.pool.n_slots))
        self._half = max(1, n_staging // 2)
        self._staged: dict[Key, int] = {}  # read ahead for a prefill's next layer
        self._promised: set[Key] = set()  # read ahead into the cache
        self._sound = True

    def promise(self, layer: int, experts: Sequence[int], now: int) -> None:
        """Read experts ahead of their layer, into the cache."""
        for expert in self.residency.promise(layer, experts, now):
            key = Key(layer, expert)
            self._promised.add(key)
            self._fetch(self.residency.slot_of[key], key, AHEAD)

    def withdraw(self) -> None:
        """A new step begins: what was read ahead of the last one and not used is not needed."""
        self.residency.withdraw()
        self.reads.wasted += len(self._promised) + len(self._staged)
        self._promised.clear()
        self._unstage(list(self._staged))

    def stage(self, layer: int, experts: Iterable[int]) -> None:
        """Read experts of a prefill's next layer ahead, as many as there are staging slots."""
        held = set(self.residency.experts_of(layer))
        for expert in experts:
            key = Key(layer, expert)
            if not self._staging:
                return
            if expert not in held and key not in self._staged:
                self._staged[key] = slot = self._staging.pop()
                self._fetch(slot, key, AHEAD)

    def offer(self, keys: Iterable[Key]) -> None:
        """Read records into free slots in the background."""
        for key in keys:
            slot = self.residency.offer(key)
            if slot is not None:
                self._fetch(slot, key, BACKGROUND)

    def admit(self, keys: Iterable[Key], now: int) -> None:
        """Read records in the background that the next tokens will probably want."""
        for key in keys:
            slot = self.residency.admit(key, now)
            if slot is not None:
                self._fetch(slot, key, BACKGROUND)

    def place(
        self, layer: int, experts: Sequence[int], now: int, keep: Iterable[int] | None
    ) -> Placement:
        """Decide where the experts of a layer-step lie, and start reading what is missing."""
        if not self._sound:
            self.recover()
        placed = self.residency.use(layer, experts, now, keep)
        self._account(layer, experts)
        for expert in placed.missing:
            key, slot = Key(layer, expert), placed.slots[expert]
            if key in self._staged:
                self._wait([self._staged[key]])
                self.pool.copy(self._staged[key], slot, key)
                self._unstage([key])
        for expert, slot in placed.slots.items():
            self._fetch(slot, Key(layer, expert), DEMAND)
        return placed

    def batches(
        self,
        layer: int,
        placed: Placement,
        ahead: Callable[[], None],
        limit: int | None = None,
    ) -> Iterator[Batch]:
        """The experts of a placement, each in one batch of at most `limit`, as they arrive.

        ahead: called whenever all of this layer's reads are on their way, to ask for others.
        """
        here = {e: s for e, s in placed.slots.items() if self.pool.holds(s, Key(layer, e))}
        coming = {e: s for e, s in placed.slots.items() if e not in here}
        todo = deque(placed.outside)
        flying: deque[tuple[int, int]] = deque()
        self._top_up(layer, todo, flying)
        if not todo:
            ahead()
        for some in _pieces(here, limit):
            yield Batch(some, passing=False)
        for some in _pieces(coming, limit):
            self._wait(some.values())
            yield Batch(some, passing=False)
        while flying:
            n = min(self._half, len(flying), limit or self._half)
            batch = dict(flying.popleft() for _ in range(n))
            self._wait(batch.values())
            yield Batch(batch, passing=True)
            self._staging.extend(batch.values())
            self._top_up(layer, todo, flying)
            if not todo:
                ahead()

    def recover(self) -> None:
        """After an error or an interrupt: what the slots hold is what counts."""
        self._sound = False
        held = self.pool.settled()
        self.residency.rebuild({s: key for s, key in held.items() if s < self.n_cached})
        self._staging = list(range(self.n_cached, self.pool.n_slots))
        self._staged, self._promised = {}, set()
        self._sound = True

    def _top_up(self, layer: int, todo: deque[int], flying: deque[tuple[int, int]]) -> None:
        """Give the next experts staging slots and start reading them."""
        while todo:
            key = Key(layer, todo[0])
            slot = self._staged.pop(key, None)
            if slot is None:
                if not self._staging:
                    return
                slot = self._staging.pop()
            flying.append((todo.popleft(), slot))
            self._fetch(slot, key, DEMAND)

    def _account(self, layer: int, experts: Sequence[int]) -> None:
        """What became of the reads ahead of this layer; those in vain are given up."""
        wanted = set(experts)
        ahead = {key: self.residency.slot_of.get(key) for key in self._promised}
        ahead |= self._staged
        ended = [key for key in ahead if key.layer == layer]
        for key in ended:
            slot = ahead[key]
            if key.expert not in wanted or slot is None:
                self.reads.wasted += 1
            elif self.pool.holds(slot, key):
                self.reads.useful += 1
            else:
                self.reads.late += 1
        self._promised.difference_update(ended)
        self._unstage([key for key in ended if key.expert not in wanted])

    def _unstage(self, keys: Iterable[Key]) -> None:
        for key in keys:
            slot = self._staged.pop(key, None)
            if slot is not None:
                self.pool.drop(slot)
                self._staging.append(slot)

    def _fetch(self, slot: int, key: Key, urgency: int) -> None:
        self.reads.records += self.pool.fetch(slot, key, urgency)

    def _wait(self, slots: Iterable[int]) -> None:
        start = perf_counter()
        self.pool.wait(slots)
        self.stall_s += perf_counter() - start


def _pieces(slots: Mapping[int, int], limit: int | None) -> Iterator[dict[int, int]]:
    """In order, at most `limit` at a time."""
    items = iter(slots.items())
    while some := dict(islice(items, limit)):
        yield some
