"""Does reading ahead pay? A routing trace replayed on a clock that only counts.

Slots, policies, promises and cancelled reads are the engine's own code. What is made up is time:
computing takes as long as asked, a disk reads a few records at a time, each as long as asked, and
the clock moves when the loop computes or waits. So the result depends on no machine and no load.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import cast

import numpy as np

from ds4py.experts.policy import DECODE_ROWS, LRU, Ids, Key
from ds4py.experts.reader import DEMAND, Load, Readers
from ds4py.experts.section import Section
from ds4py.experts.trace import Step, Trace, TraceFacts

BEFORE_ROUTER = 0.6
"""Share of a layer's computing that comes before its experts are known: attention, the router."""
DEPTH = 4
"""Reads in flight."""
RATIOS = (4.0, 1.0, 0.25)
"""Computing to reading."""


class CountedReaders:
    """Stands for `reader.Readers`: `depth` reads in flight of `read_s` each."""

    def __init__(self, depth: int, read_s: float):
        self.now, self.n_reads = 0.0, 0
        self._read_s, self._idle = read_s, depth
        self._queue: list[tuple[int, int, Load]] = []
        self._flying: list[tuple[float, int, Load]] = []
        self._order = count()

    def submit(self, key: Key, into: memoryview, urgency: int) -> Load:
        load = Load(key, into, urgency)
        self._push(load)
        self._start()
        return load

    def hurry(self, load: Load, urgency: int = DEMAND) -> None:
        if load.state == "queued" and urgency < load.urgency:
            load.urgency = urgency
            self._push(load)

    def cancel(self, load: Load) -> None:
        if load.state == "queued":
            load.state = "cancelled"
        self.wait([load])

    def wait(self, loads: Iterable[Load]) -> None:
        for load in loads:
            while not load.finished:
                self.advance(self._flying[0][0])

    def advance(self, until: float) -> None:
        """Let the clock run; reads end and others begin meanwhile."""
        while self._flying and self._flying[0][0] <= until:
            self.now, _, load = heapq.heappop(self._flying)
            load.state = "done"
            self._idle += 1
            self._start()
        self.now = max(self.now, until)

    def _push(self, load: Load) -> None:
        heapq.heappush(self._queue, (load.urgency, next(self._order), load))

    def _start(self) -> None:
        while self._idle and self._queue:
            load = heapq.heappop(self._queue)[2]
            if load.state == "queued":
                load.state = "reading"
                self._idle -= 1
                self.n_reads += 1
                end = self.now + self._read_s
                heapq.heappush(self._flying, (end, next(self._order), load))


@dataclass(frozen=True)
class Replay:
    """One run over a trace."""

    token_s: float
    reads: float
    """Per token."""


@dataclass(frozen=True)
class Slots:
    """Stands for the array that kernels would read."""

    n_slots: int
    n_bytes: int = 1

    @property
    def shape(self) -> tuple[int, int]:
        return self.n_slots, self.n_bytes


def replay(trace: Trace, n_slots: int, prefetch: str, compute_s: float, read_s: float) -> Replay:
    """The decoding steps of a trace in a cache of `n_slots`.

    compute_s: of a token. read_s: a record takes DEPTH times as long, DEPTH of them are in flight.
    """
    facts, clock = trace.facts, CountedReaders(DEPTH, DEPTH * read_s)
    steps = [step for step in trace.steps if step.n_tokens <= DECODE_ROWS]
    section = Section(
        range(facts.n_layers),
        facts.n_chosen,
        LRU(),
        0,
        Slots(n_slots),
        memoryview(bytearray(n_slots)),
        cast(Readers, clock),
    )
    for now, step in enumerate(steps, 1):
        section.withdraw()
        if prefetch != "off":
            for layer in facts.hash_layers:
                section.promise(layer, np.unique(step.chosen[layer]).tolist(), now)
        for layer in range(facts.n_layers):
            clock.advance(clock.now + BEFORE_ROUTER * compute_s / facts.n_layers)
            placed = section.place(layer, np.unique(step.chosen[layer]).tolist(), now, None)
            guess = step.foreseen.get(layer + 1) if prefetch == "router" else None
            for _ in section.batches(layer, placed, partial(_promise, section, layer, guess, now)):
                pass
            clock.advance(clock.now + (1 - BEFORE_ROUTER) * compute_s / facts.n_layers)
    return Replay(clock.now / len(steps), clock.n_reads / len(steps))


def _promise(section: Section, layer: int, guess: Ids | None, now: int) -> None:
    """Read what was guessed of the layer after this one."""
    if guess is not None and layer + 1 in section.layers:
        section.promise(layer + 1, list(dict.fromkeys(guess.ravel().tolist())), now)


@dataclass(frozen=True)
class Gain:
    """Reading ahead by the next layer's router against hash-routed layers alone."""

    slots: int
    ratio: float
    """Computing to reading, of what has to be read anyway."""
    speed: float
    """Tokens per second, as a multiple."""
    bound: float
    """Were all reads behind computing, and none in vain."""
    more_reads: float
    """As a share."""


def gains(trace: Trace, sizes: Sequence[int], ratios: Sequence[float] = RATIOS) -> Iterator[Gain]:
    """At every cache size and ratio."""
    for n_slots in sizes:
        read_s = replay(trace, n_slots, "hash", 0.0, 1.0).token_s
        for ratio in ratios:
            plain, routed = (
                replay(trace, n_slots, way, ratio * read_s, 1.0) for way in ("hash", "router")
            )
            bound = plain.token_s / max(ratio * plain.reads, plain.reads, ratio * read_s)
            more = routed.reads / plain.reads - 1
            yield Gain(n_slots, ratio, plain.token_s / routed.token_s, bound, more)


def made_up(
    n_steps: int,
    reuse: float,
    recall: float,
    n_layers: int = 43,
    n_experts: int = 256,
    n_chosen: int = 6,
    hashed: int = 3,
    seed: int = 0,
) -> Trace:
    """A trace of V4-Flash's shape: each expert of a score-routed layer is chosen again with
    probability `reuse`, and guessed with probability `recall`."""
    rng = random.Random(seed)
    facts = TraceFacts("made up", n_layers, tuple(range(hashed)), n_experts, n_chosen)
    sets = [rng.sample(range(n_experts), n_chosen) for _ in range(n_layers)]
    steps = []
    for _ in range(n_steps):
        step = Step(1, True)
        for layer in range(n_layers):
            kept = [e for e in sets[layer] if layer >= hashed and rng.random() < reuse]
            sets[layer] = kept + _others(rng, n_experts, n_chosen - len(kept), kept)
            step.chosen[layer] = np.array([sets[layer]], np.uint16)
            if layer >= hashed:
                right = [e for e in sets[layer] if rng.random() < recall]
                wrong = _others(rng, n_experts, n_chosen - len(right), sets[layer])
                step.foreseen[layer] = np.array([right + wrong], np.uint16)
        steps.append(step)
    return Trace(facts, steps)


def _others(rng: random.Random, n_experts: int, n: int, barred: Sequence[int]) -> list[int]:
    found: list[int] = []
    while len(found) < n:
        expert = rng.randrange(n_experts)
        if expert not in barred and expert not in found:
            found.append(expert)
    return found


def recall(trace: Trace) -> float:
    """Share of the experts of score-routed layers that were guessed."""
    hits = asked = 0
    for step in trace.steps:
        for layer, guess in step.foreseen.items():
            chosen = set(step.chosen[layer].ravel().tolist())
            hits += len(chosen & set(guess.ravel().tolist()))
            asked += len(chosen)
    return hits / max(1, asked)
