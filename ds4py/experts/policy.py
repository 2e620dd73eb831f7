"""Which expert records are in memory, and which gives way to the next.

Pure bookkeeping: no I/O, no threads, no clock but the caller's count of steps. The engine and the
simulator that replays a trace run this same code, so both count the same misses.

Every layer is sure of `minimum` slots; the rest is shared. A layer takes a free slot, or the slot
of the least valuable record: its own, or another layer's that holds more than its minimum. Records
of the running layer and promised ones (prefetched for a layer still to come) are never taken.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from ds4py.errors import OptionsError

Ids = npt.NDArray[np.integer[Any]]

HALF_LIFE = 128
"""Steps after which a use counts half in `Decayed`."""


DECODE_ROWS = 8
"""Steps of at most this many tokens are decoding (and drafts): their experts stay in memory."""


class Key(NamedTuple):
    """An expert of a layer."""

    layer: int
    expert: int


class Policy(Protocol):
    """What a record is worth. It changes only when the record is used."""

    def score(self, key: Key, now: int) -> float:
        """The value of a record used at step `now`; the lowest gives way first."""
        ...


class LRU:
    """The record unused for the longest gives way. Ages are steps: within one step all are
    equal, so that a layer does not take the record of a layer that is about to run."""

    def score(self, key: Key, now: int) -> float:
        return now


class Decayed:
    """Use counts that halve every HALF_LIFE steps, kept as logarithms at step 0: the order of two
    records does not change while neither is used."""

    def __init__(self, half_life: float = HALF_LIFE) -> None:
        self._half_life = half_life
        self._scores: dict[Key, float] = {}

    def score(self, key: Key, now: int) -> float:
        fresh = now / self._half_life
        old = self._scores.get(key, -math.inf)
        total = fresh + math.log2(1 + 2.0 ** max(old - fresh, -60)) if old > -math.inf else fresh
        self._scores[key] = total
        return total


class Belady:
    """The record whose next use lies farthest ahead gives way: the bound no policy can pass.

    uses: per record the steps it is used at, ascending. For replays only.
    """

    def __init__(self, uses: Mapping[Key, Sequence[int]]):
        self._uses = {key: list(reversed(steps)) for key, steps in uses.items()}

    def score(self, key: Key, now: int) -> float:
        ahead = self._uses.get(key, [])
        while ahead and ahead[-1] <= now:
            ahead.pop()
        return -ahead[-1] if ahead else -math.inf


def online_policy(name: str) -> Policy:
    """By the names of `options.POLICIES`."""
    return {"lru": LRU, "decayed": Decayed}[name]()


@dataclass
class Counts:
    """What happened since the start, in expert records asked for."""

    hits: int = 0
    """Were in memory."""
    prefetched: int = 0
    """Had been promised, and their read was on its way or done."""
    misses: int = 0
    """Had to be read."""
    wasted: int = 0
    """Were promised and read, and their layer did not ask for them."""

    @property
    def asked(self) -> int:
        return self.hits + self.prefetched + self.misses


@dataclass
class Placement:
    """Where the experts of one layer-step lie."""

    slots: dict[int, int] = field(default_factory=dict)
    """Expert -> slot, for those with a place in the cache."""
    missing: list[int] = field(default_factory=list)
    """Experts that have to be read into their slot."""
    outside: list[int] = field(default_factory=list)
    """Experts without a place: read for this step only."""


class Residency:
    """Slots 0..n_slots-1 and the records they are for."""

    def __init__(self, n_slots: int, layers: Sequence[int], minimum: int, policy: Policy):
        """Raises OptionsError unless every layer can have its minimum."""
        if n_slots < minimum * len(layers):
            raise OptionsError(
                f"{n_slots} expert slots for {len(layers)} layers; each layer needs the "
                f"{minimum} a token uses, {minimum * len(layers)} in all"
            )
        self.n_slots, self.minimum, self.policy = n_slots, minimum, policy
        self.counts = {layer: Counts() for layer in layers}
        self.slot_of: dict[Key, int] = {}
        self._held: dict[int, dict[int, float]] = {layer: {} for layer in layers}
        self._heaps: dict[int, list[tuple[float, int]]] = {layer: [] for layer in layers}
        self._free = list(range(n_slots - 1, -1, -1))
        self._promised: dict[int, dict[int, bool]] = {}  # whether the promise meant a read
        self._running: tuple[int, set[int]] = (-1, set())  # what is being computed with

    def experts_of(self, layer: int) -> Iterable[int]:
        """The layer's experts that have a slot."""
        return self._held[layer].keys()

    def use(
        self, layer: int, experts: Sequence[int], now: int, keep: Iterable[int] | None = None
    ) -> Placement:
        """Places for the experts of a layer-step; ascending, all different.

        keep: those worth a slot, in order of preference, all by default. Of a prefill only few
        are, so that it leaves what decoding needs; the others keep their value where present.
        """
        held, counts = self._held[layer], self.counts[layer]
        promised = self._promised.pop(layer, {})
        wanted, placed = set(experts), Placement()
        self._waste(layer, [e for e, read in promised.items() if read and e not in wanted])
        self._running = layer, wanted
        keeping = list(experts) if keep is None else list(keep)
        for expert in experts:
            if expert in held:
                counts.prefetched += promised.get(expert, False)
                counts.hits += not promised.get(expert, False)
                placed.slots[expert] = self.slot_of[Key(layer, expert)]
        for expert in keeping:
            if expert in held:
                self._value(layer, expert, self.policy.score(Key(layer, expert), now))
        for expert in keeping:
            if expert not in held:
                slot = self._slot(layer)
                if slot is not None:
                    score = self.policy.score(Key(layer, expert), now)
                    self._place(layer, expert, slot, score)
                    placed.slots[expert] = slot
                    placed.missing.append(expert)
        counts.misses += len(experts) - len(placed.slots) + len(placed.missing)
        placed.outside = [expert for expert in experts if expert not in placed.slots]
        return placed

    def promise(self, layer: int, experts: Sequence[int], now: int) -> list[int]:
        """Give experts that a coming layer-step will probably use a slot and protect them until
        then; those that have to be read. Without a place to spare an expert is left out.
        """
        held, missing = self._held[layer], []
        promised = self._promised.setdefault(layer, {})
        fresh = [e for e in experts if e not in promised][: self.minimum - len(promised)]
        promised.update((expert, False) for expert in fresh if expert in held)
        for expert in fresh:
            if expert not in promised and (slot := self._slot(layer)) is not None:
                self._place(layer, expert, slot, now)
                promised[expert] = True
                missing.append(expert)
        return missing

    def withdraw(self) -> None:
        """Forget promises nobody came for: records read for them give way first."""
        for layer, promised in self._promised.items():
            self._waste(layer, [expert for expert, read in promised.items() if read])
        self._promised = {}

    def offer(self, key: Key) -> int | None:
        """A free slot for a record that may be of use, if there is one to spare."""
        if key in self.slot_of or self._spare(key.layer) <= 0 or not self._free:
            return None
        slot = self._free.pop()
        self._place(key.layer, key.expert, slot, -math.inf)
        return slot

    def admit(self, key: Key, now: int) -> int | None:
        """A slot for a record that will soon be wanted; None when it has one or all are in use."""
        if key in self.slot_of:
            return None
        slot = self._slot(key.layer)
        if slot is not None:
            self._place(key.layer, key.expert, slot, self.policy.score(key, now))
        return slot

    def ranked(self) -> list[Key]:
        """The records with a slot, the most valuable first."""
        scored = [(-s, layer, e) for layer, held in self._held.items() for e, s in held.items()]
        return [Key(layer, expert) for _, layer, expert in sorted(scored)]

    def worth_keeping(self, layer: int, chosen: Ids, last: bool) -> list[int] | None:
        """What `use` should keep of the ids [S, k] a step chose; None: all of them.

        Of a prefill: what its last token chose, as decoding goes on from there, and where slots
        are free the most wanted ones, up to the layer's even share.
        """
        if len(chosen) <= DECODE_ROWS:
            return None
        held = len(self._held[layer])
        room = min(self.n_slots // len(self._held) - held, self._spare(layer))
        experts, counts = np.unique(chosen, return_counts=True)
        wanted = experts[np.argsort(-counts, kind="stable")][: max(0, room)]
        tail = np.unique(chosen[-1]).tolist() if last else []
        return list(dict.fromkeys([*tail, *wanted.tolist()]))

    def rebuild(self, content: Mapping[int, Key]) -> None:
        """Start again from what the slots really hold, after an error or an interrupt."""
        scores = {Key(layer, e): s for layer, held in self._held.items() for e, s in held.items()}
        self.slot_of, self._promised = {}, {}
        for layer in self._held:
            self._held[layer], self._heaps[layer] = {}, []
        for slot, key in sorted(content.items()):
            if key not in self.slot_of:
                self._place(key.layer, key.expert, slot, scores.get(key, -math.inf))
        taken = set(self.slot_of.values())
        self._free = [slot for slot in range(self.n_slots - 1, -1, -1) if slot not in taken]

    def _spare(self, layer: int) -> int:
        """Free slots this layer may take without touching what is kept for the others."""
        owed = sum(max(0, self.minimum - len(h)) for n, h in self._held.items() if n != layer)
        return len(self._free) - owed

    def _slot(self, layer: int) -> int | None:
        """A free slot, or that of the least valuable record; None when all are in use."""
        if self._free and self._spare(layer) > 0:
            return self._free.pop()
        best: tuple[float, bool, int, int] | None = None
        for other, held in self._held.items():
            if other == layer or len(held) > self.minimum:
                found = self._lowest(other)
                if found is not None:
                    candidate = (found[0], other != layer, other, found[1])
                    best = candidate if best is None else min(best, candidate)
        if best is None:
            return None
        key = Key(best[2], best[3])
        del self._held[key.layer][key.expert]
        return self.slot_of.pop(key)

    def _lowest(self, layer: int) -> tuple[float, int] | None:
        """Score and expert of a layer's least valuable record that may go."""
        held, heap = self._held[layer], self._heaps[layer]
        running = self._running[1] if self._running[0] == layer else ()
        barred, aside = {*running, *self._promised.get(layer, ())}, []
        found = None
        while heap:
            if held.get(heap[0][1]) != heap[0][0]:  # of an earlier use
                heappop(heap)
            elif heap[0][1] in barred:
                aside.append(heappop(heap))
            else:
                found = heap[0]
                break
        for entry in aside:
            heappush(heap, entry)
        return found

    def _waste(self, layer: int, experts: Sequence[int]) -> None:
        self.counts[layer].wasted += len(experts)
        for expert in experts:
            self._value(layer, expert, -math.inf)

    def _place(self, layer: int, expert: int, slot: int, score: float) -> None:
        self.slot_of[Key(layer, expert)] = slot
        self._value(layer, expert, score)

    def _value(self, layer: int, expert: int, score: float) -> None:
        held, heap = self._held[layer], self._heaps[layer]
        held[expert] = score
        heappush(heap, (score, expert))
        if len(heap) > 4 * len(held) + 16:  # mostly entries of earlier uses
            heap[:] = [(s, e) for e, s in held.items()]
            heapify(heap)
