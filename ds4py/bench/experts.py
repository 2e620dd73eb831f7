"""Streamed experts: how fast records are read, what a cache of them misses, how reads hide.

Three instruments: record reads against the device's own limit at the same depth; replays of a
routing trace through caches of several sizes and policies, with the bound beside them and the reuse
that explains them; and a decode loop with faked compute time, which shows how much of the reading
goes on behind the computing.
"""

from __future__ import annotations

import mmap
import os
import random
import resource
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from time import perf_counter, sleep
from typing import TYPE_CHECKING, Any

from ds4py.errors import OptionsError
from ds4py.experts import simulate
from ds4py.experts.options import PREFETCH
from ds4py.experts.policy import LRU, Key
from ds4py.experts.probe import bandwidth, scattered
from ds4py.experts.reader import ALIGN, Readers, RecordFile, RecordReader, pages_of
from ds4py.experts.section import Section
from ds4py.experts.swaps import BoundedSwaps
from ds4py.experts.trace import Trace, reuse

if TYPE_CHECKING:
    from ds4py.formats.bundle import LayerRecords

Records = Mapping[int, "LayerRecords"]

DEPTHS = (1, 2, 4, 8)
SECONDS = 1.5
"""Of each measurement of the disk."""
CACHE_SIZES = (1, 1.5, 2, 3, 4, 6, 8)
"""Slots, in tokens' worth of experts (the least a model runs with is 1)."""
REGRETS = (0.0, 0.02, 0.05, 0.1, 0.2)
"""Of cache-aware routing."""
LAGS = (1, 2, 4, 8)
LOOK_AHEAD = 2
"""Layers whose experts the loop with faked compute time knows before they run."""


@dataclass(frozen=True)
class ReadRate:
    """Reads of records at one depth."""

    depth: int
    bytes_per_s: float
    device_bytes_per_s: float
    """Of a loop that does nothing but read, at the same depth, of the same blocks."""
    cpu: float
    """Processor seconds per second of reading, of all threads."""


def read_rates(records: Records, repeat: int = 3) -> list[ReadRate]:
    """Both rates at every depth; of several runs in turn the fastest of each counts.

    Checksums are not compared, as after a record's first load.
    """
    reader = RecordReader(records, "never")
    size = max(r.record_bytes for r in records.values())
    pages = memoryview(mmap.mmap(-1, size * max(DEPTHS) * 2))
    views = [pages[i * size : (i + 1) * size] for i in range(2 * max(DEPTHS))]
    found = []
    for depth in DEPTHS:
        ours, device, cpu = 0.0, 0.0, 0.0
        for _ in range(repeat):
            device = max(device, device_rate(records, size, depth))
            before, start = _cpu_seconds(), perf_counter()
            rate = bandwidth(reader, cycle(scattered(records, size)), views, depth, SECONDS)
            if rate > ours:
                ours, cpu = rate, (_cpu_seconds() - before) / (perf_counter() - start)
        found.append(ReadRate(depth, ours, device, cpu))
    reader.close()
    return found


def device_rate(records: Records, size: int, depth: int) -> float:
    """Bytes per second of plain reads of the same blocks, `depth` threads each in its own loop."""
    keys, lock, total = cycle(scattered(records, size)), threading.Lock(), 0
    paths = {s.file for r in records.values() if r.record_bytes == size for s in r.spans}
    files = {path: RecordFile.open(path) for path in paths}
    end = perf_counter() + SECONDS

    def read() -> None:
        nonlocal total
        buffer, done = memoryview(mmap.mmap(-1, size + 2 * ALIGN)), 0
        while perf_counter() < end:
            with lock:
                key = next(keys)
            for span in records[key.layer].of(key.expert):
                start, length = pages_of(span)
                os.preadv(files[span.file].descriptor, [buffer[:length]], start)
                done += span.n_bytes
        with lock:
            total += done

    threads = [threading.Thread(target=read) for _ in range(depth)]
    start = perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = perf_counter() - start
    for file in files.values():
        os.close(file.descriptor)
    return total / seconds


@dataclass(frozen=True)
class CacheResult:
    """One cache on one trace."""

    policy: str
    slots: int
    hit_rate: float
    """Share of the experts asked for that were present or read ahead."""
    misses_per_step: float
    reads_per_step: float
    """Misses and reads ahead."""


def cache_curve(trace: Trace, sizes: Sequence[float] = CACHE_SIZES) -> list[CacheResult]:
    """Every policy at every size. Raises OptionsError for a trace without steps."""
    if not trace.steps:
        raise OptionsError("the trace has no steps; record a longer one")
    found, n_steps = [], len(trace.steps)
    for slots in cache_slots(trace, sizes):
        for policy in simulate.POLICIES:
            counts = simulate.total(simulate.replay(trace, slots, policy))
            read = counts.misses + counts.prefetched
            hits = 1 - counts.misses / max(1, counts.asked)
            found.append(CacheResult(policy, slots, hits, counts.misses / n_steps, read / n_steps))
    return found


@dataclass(frozen=True)
class AheadResult:
    """One way of reading ahead, in one LRU cache on one trace."""

    prefetch: str
    slots: int
    misses_per_step: float
    reads_per_step: float


def ahead_curve(trace: Trace, sizes: Sequence[float] = CACHE_SIZES) -> list[AheadResult]:
    """Every way at every size; "router" where the trace has its guesses."""
    ways = [way for way in PREFETCH if way != "router" or any(s.foreseen for s in trace.steps)]
    found, n_steps = [], max(1, len(trace.steps))
    for slots in cache_slots(trace, sizes):
        for way in ways:
            counts = simulate.total(simulate.replay(trace, slots, "lru", way))
            read = counts.misses + counts.prefetched + counts.wasted
            found.append(AheadResult(way, slots, counts.misses / n_steps, read / n_steps))
    return found


@dataclass(frozen=True)
class SwapResult:
    """Cache-aware routing in one LRU cache on one trace, as if swaps changed no later choice."""

    regret: float
    slots: int
    misses_per_step: float
    swapped: float
    """Share of the experts chosen in decoding."""
    kept_mass: float


def swap_curve(trace: Trace, sizes: Sequence[float] = CACHE_SIZES) -> list[SwapResult]:
    """Every regret at every size; nothing for a trace without scores."""
    if not any(step.scored for step in trace.steps):
        return []
    found, n_steps = [], max(1, len(trace.steps))
    for slots in cache_slots(trace, sizes):
        for regret in REGRETS:
            swaps = BoundedSwaps(regret)
            counts = simulate.total(simulate.replay(trace, slots, "lru", swaps=swaps))
            share, kept = swaps.counts.swapped_share, swaps.counts.kept_share
            found.append(SwapResult(regret, slots, counts.misses / n_steps, share, kept))
    return found


def cache_slots(trace: Trace, sizes: Sequence[float]) -> list[int]:
    """Sizes in tokens' worth of experts as slots."""
    least = trace.facts.n_layers * trace.facts.n_chosen
    most = trace.facts.n_layers * trace.facts.n_experts
    return sorted({min(most, round(least * size)) for size in sizes})


def reuse_table(trace: Trace) -> dict[int, list[float]]:
    """EOR of every layer at the lags LAGS: the share of experts that a token that many before
    chose, too."""
    layers = sorted({layer for step in trace.steps for layer in step.chosen})
    return {layer: [reuse(trace.decoded(layer), lag) for lag in LAGS] for layer in layers}


@dataclass(frozen=True)
class Overlap:
    """A decode loop with faked compute time."""

    ratio: float
    """Compute time to read time."""
    compute_s: float
    """Per token."""
    read_s: float
    """Per token, when nothing is computed."""
    token_s: float
    serial_s: float
    """The first layer's reads, which nothing can hide, and its computing behind the last reads."""

    @property
    def bound_s(self) -> float:
        return max(self.compute_s, self.read_s) + self.serial_s


def overlaps(
    records: Records, depth: int, n_tokens: int = 8, chosen: int = 6, repeat: int = 5
) -> Iterator[Overlap]:
    """Loops at compute:read of 4:1, 1:1 and 1:4 in which the experts of the next layers are known,
    as hash-routed layers' are. No expert is chosen twice in a row: all of them are read.

    Disks change their speed: each run stands beside one that only reads, and of `repeat` such pairs
    the median counts.
    """
    reader = RecordReader(records, "never")
    loop = _FakeDecode(records, reader, depth, chosen)
    try:
        for ratio in (4.0, 1.0, 0.25):
            pairs = []
            for _ in range(repeat):
                read_s = loop.run(n_tokens, 0.0)
                token_s = loop.run(n_tokens, ratio * read_s)
                serial = min(1.0, ratio) * read_s / loop.n_layers
                pairs.append(Overlap(ratio, ratio * read_s, read_s, token_s, serial))
            yield sorted(pairs, key=lambda o: o.token_s / o.bound_s)[repeat // 2]
    finally:
        loop.close()
        reader.close()


class _FakeDecode:
    """Layers that sleep where they would compute."""

    def __init__(self, records: Records, reader: RecordReader, depth: int, chosen: int):
        self.size = max(r.record_bytes for r in records.values())
        files = [layer for layer, r in records.items() if r.record_bytes == self.size]
        self.n_experts = records[files[0]].n_experts
        # Few big files make several layers: each takes its own range of all their records.
        total = self.n_experts * len(files)
        self.chosen = min(chosen, max(1, total // (4 * 2)))
        self.n_layers = max(2, min(8, total // (4 * self.chosen)))
        self.span = total // self.n_layers
        self.readers = Readers(lambda key, into: reader.read(self._real(key, files), into), depth)
        slots = _Slots(2 * self.chosen * self.n_layers, self.size)
        pages = memoryview(mmap.mmap(-1, slots.n_slots * self.size))
        self.section = Section(
            range(self.n_layers), 2 * self.chosen, LRU(), 0, slots, pages, self.readers
        )
        self.rng, self.now = random.Random(1), 0
        self.before: list[list[int]] = [[] for _ in range(self.n_layers)]

    def _real(self, key: Key, files: Sequence[int]) -> Key:
        at = key.layer * self.span + key.expert
        return Key(files[at // self.n_experts], at % self.n_experts)

    def _choose(self, layer: int) -> list[int]:
        fresh = [e for e in range(self.span) if e not in self.before[layer]]
        self.before[layer] = [*self.before[layer], *self.rng.sample(fresh, self.chosen)][
            -3 * self.chosen :
        ]
        return sorted(self.before[layer][-self.chosen :])

    def run(self, n_tokens: int, compute_s: float) -> float:
        """Seconds per token."""
        steps = [(i, self._choose(i)) for _ in range(n_tokens) for i in range(self.n_layers)]
        start = perf_counter()
        for n, (layer, experts) in enumerate(steps):
            self.now += layer == 0
            placed = self.section.place(layer, experts, self.now, None)
            promise = partial(self._promise, steps[n + 1 : n + 1 + LOOK_AHEAD])
            for _ in self.section.batches(layer, placed, promise):
                pass
            sleep(compute_s / self.n_layers)
        return (perf_counter() - start) / n_tokens

    def _promise(self, steps: Sequence[tuple[int, list[int]]]) -> None:
        for layer, experts in steps:
            self.section.promise(layer, experts, self.now)

    def close(self) -> None:
        self.readers.close()


@dataclass(frozen=True)
class _Slots:
    """Stands for the array that kernels would read."""

    n_slots: int
    n_bytes: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.n_slots, self.n_bytes


def decode(engine: Any, prompt: Sequence[int], n_tokens: int) -> tuple[Trace, float]:
    """Read a prompt and decode greedily -> the routing trace and tokens per second."""
    from ds4py import SamplingOptions
    from ds4py.experts.trace import Recorder, TraceFacts

    recorder = engine.experts.trace = Recorder(TraceFacts.of(engine.name, engine.config))
    try:
        session = engine.session()
        session.sync(prompt)
        options = SamplingOptions(temperature=1.0, seed=1, max_tokens=n_tokens, stop_at_eos=False)
        start = perf_counter()
        n_made = sum(1 for _ in session.generate(options))
        rate = n_made / (perf_counter() - start)
    finally:
        engine.experts.trace = None
        recorder.finish()
    return recorder.trace, rate


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
