"""Routed experts that live on disk: the model asks, and they are in memory when it computes.

The ids a router chose decide what is read, so each layer waits for them here; with them the layer
before is computed to the end, after which nothing reads that layer's slots any more. Which experts
stay in memory changes the time a step takes and nothing else: a row's result depends on its own
expert only, and the sums run in ascending expert id whatever arrives first.
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from typing import Any

import mlx.core as mx
import numpy as np

from ds4py.config import ModelConfig
from ds4py.experts.layout import maps_of
from ds4py.experts.options import StreamingOptions
from ds4py.experts.policy import DECODE_ROWS, Ids, Key, Placement, online_policy
from ds4py.experts.probe import choose_depth
from ds4py.experts.reader import Readers, ReadInto, RecordReader
from ds4py.experts.section import DECODED, STAGING, Batch, Section
from ds4py.experts.swaps import BoundedSwaps, Ranked
from ds4py.formats.bundle import LayerRecords
from ds4py.kernels import moe
from ds4py.kernels.formats import ExpertRecords
from ds4py.kernels.ops import Array, Ops, PackedWeight
from ds4py.model.block import Block
from ds4py.model.fused import Streams
from ds4py.model.moe import Compute, ExpertSource, MoE, ResidentExperts

SURE = 4
"""Read a whole layer ahead when a chunk chooses this many times as often as there are experts."""
STEPS_REMEMBERED = 4096
"""Steps whose waiting time is kept for percentiles."""


@dataclass(frozen=True)
class SlotPlan:
    """How many slots the layers of one record size get."""

    layers: tuple[int, ...]
    record_bytes: int
    n_cached: int
    n_staging: int

    @property
    def n_slots(self) -> int:
        return self.n_cached + self.n_staging

    @property
    def n_bytes(self) -> int:
        return self.n_slots * self.record_bytes


def staging_slots(n_experts: int) -> int:
    """Slots besides the cache, per record size."""
    return max(2, min(STAGING, n_experts))


class StreamedExperts(ExpertSource):
    """The experts of all layers, some of them in memory."""

    def __init__(
        self,
        ops: Ops,
        config: ModelConfig,
        records: Mapping[int, LayerRecords],
        options: StreamingOptions,
        read_into: ReadInto = os.preadv,
    ):
        """Opens the files. Raises WeightsError."""
        self.ops, self.config, self.options, self.records = ops, config, options, records
        self.reader = RecordReader(records, options.verify, read_into)
        self.depth = 0
        """Reads in flight."""
        self.sections: list[Section] = []
        self.stalls: deque[float] = deque(maxlen=STEPS_REMEMBERED)
        """Seconds each decoding step waited for reads."""
        self._section: dict[int, Section] = {}
        self._maps: dict[int, tuple[PackedWeight, PackedWeight]] = {}
        self._located: dict[int, ExpertRecords] = {}
        self._tables: dict[int, Ids] = {}  # of hash-routed layers: [vocab, k]
        self._routers: dict[int, Callable[[Array, Array], Array]] = {}
        self._step: Array = None  # token ids [S] of the running step
        self._tokens: Ids = np.zeros(0, np.int32)  # the same on the host
        self._last, self._now, self._stalled = True, 0, 0.0
        self._swaps = BoundedSwaps(options.swap)
        self._displaced: list[Key] = []  # by the running layer's swaps
        self._unread: Array | None = None  # streams that need all computed so far
        self._foreseen: Array | None = None
        self._decoding = True
        self._announced = False  # something of the next step, while the last one is over

    def start(self, plans: Sequence[SlotPlan], blocks: Sequence[Block]) -> None:
        """Allocate the slots, find the best number of reads in flight, and learn what the model's
        layers tell ahead: hash tables, and routers. Called once, when the rest is loaded.

        Raises OptionsError for fewer slots than one token uses, WeightsError when the probe fails.
        """
        regions = [_region(self.ops, plan.n_slots, plan.record_bytes) for plan in plans]
        largest = max(regions, key=lambda region: len(region[1]))[1]
        self.depth = self.options.readers or choose_depth(self.reader, self.records, largest)
        readers = Readers(self.reader.read, self.depth)
        self._finalizer = weakref.finalize(self, _close, readers, self.reader)
        for plan, (region, view) in zip(plans, regions, strict=True):
            policy, k = online_policy(self.options.policy), self.config.num_experts_per_tok
            section = Section(plan.layers, k, policy, plan.n_staging, region, view, readers)
            self.sections.append(section)
            for layer in plan.layers:
                self._section[layer] = section
                self._maps[layer] = maps_of(self.records[layer], region, self.config)
        for block in blocks:
            ffn = block.ffn
            if self.options.prefetch != "off" and ffn.tid2eid is not None:
                if self.ops.lazy:
                    mx.eval(ffn.tid2eid)  # looked up on the host from here on
                self._tables[ffn.index] = np.asarray(ffn.tid2eid)
            elif self.options.prefetch == "router":
                plain = replace(ffn, experts=ResidentExperts(self.ops, 0.0))
                self._routers[ffn.index] = partial(_predict, block, plain)

    def close(self) -> None:
        """Stop reading. Called by itself at the end of the object's life."""
        self._finalizer()

    # The model's side.

    def begin(self, tokens: Array, last: bool) -> None:
        super().begin(tokens, last)
        if self._now and self._decoding:
            self.stalls.append(self._stalled)
        self._stalled, self._foreseen, self._step = 0.0, None, tokens
        self._now += 1
        self._last, self._decoding = last, tokens.shape[0] <= DECODE_ROWS
        self.announce(tokens)
        self._announced = False

    def announce(self, tokens: Array) -> None:
        """Their hash-routed layers' experts are read from now on."""
        with self._recovering():
            if not self._announced:
                for section in self.sections:
                    section.withdraw()
            self._announced = True
            if self.options.prefetch != "off":
                if self.ops.lazy:
                    mx.eval(tokens)  # the experts of hash-routed layers are rows of a table
                self._tokens = np.asarray(tokens)
                self._read_hashed(self._tokens)

    def _read_hashed(self, tokens: Ids) -> None:
        if len(tokens) <= DECODE_ROWS:
            for layer, table in self._tables.items():
                experts = np.unique(table[tokens]).tolist()
                self._section[layer].promise(layer, experts, self._now)
        elif self._tables:
            first = min(self._tables)
            self._section[first].stage(first, np.unique(self._tables[first][tokens]).tolist())

    def end(self, streams: Array) -> None:
        if self.ops.lazy:
            self._unread = streams

    def foresee(self, layer: int, streams: Array) -> None:
        self.end(streams)  # they need all that the layers before computed
        router = self._routers.get(layer + 1)
        if router is not None and self._decoding:
            self._foreseen = router(streams, self._step)
            if self.trace is not None:
                self.trace.foreseen(layer + 1, self._foreseen)

    @property
    def prefers(self) -> bool:
        return super().prefers or self.options.swap > 0

    def prefer(self, layer: int, score: Array, bias: Array, ids: Array) -> Array:
        ids = super().prefer(layer, score, bias, ids)
        if not self.options.swap or len(ids) > 1:
            return ids
        if self.ops.lazy:
            mx.eval(score)  # swaps depend on what is in memory, which only the host knows
        held = self._section[layer].residency.slot_of
        chosen, displaced = self._swaps.choose(
            layer,
            Ranked.of(np.asarray(score)[0], np.asarray(bias)),
            ids.shape[1],
            lambda expert: Key(layer, expert) in held,
        )
        if not displaced:
            return ids
        self._displaced = [Key(layer, expert) for expert in displaced]
        return self.ops.array(chosen[None]).astype(ids.dtype)

    def hot_set(self) -> list[tuple[int, int]]:
        ranked = [section.residency.ranked() for section in self.sections]
        return [(key.layer, key.expert) for keys in zip_longest(*ranked) for key in keys if key]

    def warm(self, hot: Sequence[tuple[int, int]]) -> None:
        for section in self.sections:
            keys = (Key(*key) for key in hot if key[0] in section.layers)
            section.offer(key for key in keys if 0 <= key.expert < self.config.n_routed_experts)

    def stats(self) -> dict[str, Any]:
        counts = [c for s in self.sections for c in s.residency.counts.values()]
        hits, misses = sum(c.hits for c in counts), sum(c.misses for c in counts)
        prefetched = sum(c.prefetched for c in counts)
        asked, swaps = max(1, hits + prefetched + misses), self._swaps.counts
        size = {s: s.pool.record_bytes for s in self.sections}
        waits = sorted(self.stalls) or [0.0]
        return {
            "slots": sum(s.n_cached for s in self.sections),
            "slot_bytes": sum(s.pool.n_slots * size[s] for s in self.sections),
            "policy": self.options.policy,
            "prefetch": self.options.prefetch,
            "readers": self.depth,
            "direct": self.reader.direct,
            "steps": self._now,
            "hits": hits,
            "prefetched": prefetched,
            "misses": misses,
            "hit_rate": (hits + prefetched) / asked,
            "bytes_read": sum(s.reads.records * size[s] for s in self.sections),
            "ahead_useful_bytes": sum(s.reads.useful * size[s] for s in self.sections),
            "ahead_late_bytes": sum(s.reads.late * size[s] for s in self.sections),
            "ahead_wasted_bytes": sum(s.reads.wasted * size[s] for s in self.sections),
            "stall_ms_p50": 1e3 * waits[len(waits) // 2],
            "stall_ms_p95": 1e3 * waits[len(waits) * 95 // 100],
            "swap": self.options.swap,
            "swapped": swaps.swapped_share,
            "kept_mass": swaps.kept_share,
        }

    def _routed(self, layer: int, x: Array, ids: Array, weight: Array) -> Array:
        with self._recovering():
            return self._compute(layer, self._to_host(ids), x, ids, weight)

    def place(self, layer: int, ids: Array) -> tuple[ExpertRecords, Array] | None:
        if self.observe is not None or ids.shape[0] > DECODE_ROWS:
            return None
        with self._recovering():
            chosen, section = self._to_host(ids), self._section[layer]
            experts = np.unique(chosen).tolist()
            if len(experts) > section.residency.minimum:
                return None
            if self.trace is not None:
                self.trace.chosen(layer, ids)
            placed = section.place(layer, experts, self._now, None)
            for _ in self._arriving(layer, placed, True, None):
                pass  # until all are there
        slots = np.zeros(self.config.n_routed_experts, np.int32)
        slots[experts] = [placed.slots[expert] for expert in experts]
        return self._records_of(layer), self.ops.array(slots[chosen])

    def in_parts(self, layer: int, ids: Array, compute: Compute) -> Array | None:
        if self.observe is not None:
            return None
        if self.trace is not None:
            self.trace.chosen(layer, ids)
        with self._recovering():
            return self._compute_in_parts(layer, self._to_host(ids), compute)

    def _compute_in_parts(self, layer: int, chosen: Ids, compute: Compute) -> Array:
        s, k = chosen.shape
        numbers = np.arange(s * (k + 1)).reshape(s, k + 1)  # of the results, the shared one's last
        rows: list[Ids] = []
        parts: list[Array] = []
        for batch in self._arriving(layer, self._placed(layer, chosen), s <= DECODE_ROWS, None):
            place = np.full(self.config.n_routed_experts, -1, np.int32)
            place[list(batch.slots)] = list(batch.slots.values())
            slots = place[chosen]
            here, first = slots >= 0, not parts
            some = mx.array(np.where(here, chosen, -1).astype(np.int32))
            part = compute(self._records_of(layer), some, mx.array(np.maximum(slots, 0)), first)
            if here.all() and not batch.passing:
                return part
            mine = numbers[np.pad(here, ((0, 0), (0, 1)), constant_values=first)]
            part = part.reshape(len(numbers.ravel()), -1)[mx.array(mine)]
            # Passing slots are read no more once it is computed; else only start it.
            (mx.eval if batch.passing else mx.async_eval)(part)
            rows.append(mine)
            parts.append(part)
        back = np.argsort(np.concatenate(rows))
        return mx.concatenate(parts)[mx.array(back)].reshape(s, k + 1, -1)

    def _records_of(self, layer: int) -> ExpertRecords:
        if layer not in self._located:
            self._located[layer] = ExpertRecords.of(*self._maps[layer])
        return self._located[layer]

    def _placed(self, layer: int, chosen: Ids) -> Placement:
        """Where all chosen experts will lie."""
        section = self._section[layer]
        keep = section.residency.worth_keeping(layer, chosen, self._last)
        return section.place(layer, np.unique(chosen).tolist(), self._now, keep)

    def _arriving(
        self, layer: int, placed: Placement, decoding: bool, most: int | None
    ) -> Iterator[Batch]:
        """`Section.batches` of the running layer; the next one's are read ahead."""
        section = self._section[layer]
        stalled = section.stall_s
        ahead = partial(self._look_ahead, section, layer + 1, decoding)
        try:
            yield from section.batches(layer, placed, ahead, most)
        finally:
            self._stalled += section.stall_s - stalled

    @contextmanager
    def _recovering(self) -> Iterator[None]:
        """Whatever ends the work early, slots and bookkeeping agree afterwards."""
        try:
            yield
        except BaseException:
            for section in self.sections:
                section.recover()
            raise

    def _to_host(self, ids: Array) -> Ids:
        """The chosen ids [S, k]; and whatever read the slots of the layers before is through."""
        if self.ops.lazy:
            waiting = [a for a in (ids, self._foreseen, self._unread) if a is not None]
            mx.eval(waiting)  # what is read from disk depends on it
            self._unread = None
        return np.asarray(ids)

    def _compute(self, layer: int, chosen: Ids, x: Array, ids: Array, weight: Array) -> Array:
        section, placed = self._section[layer], self._placed(layer, chosen)
        n_experts, decoding = len(np.unique(chosen)), len(chosen) <= DECODE_ROWS
        observe = partial(self.observe, layer) if self.observe is not None else None
        pairs, order = None, np.sort(chosen, axis=None)
        rows: list[Ids] = []
        parts: list[Array] = []
        most = DECODED if self.ops.lazy else None
        for batch in self._arriving(layer, placed, decoding, most):
            w13, w2, place = self._lay_out(layer, section, batch.slots)
            if len(batch.slots) == n_experts and not batch.passing:
                slots = self.ops.array(place[chosen])
                limit = self.config.swiglu_limit
                return moe.routed(self.ops, x, ids, weight, w13, w2, limit, observe, slots)
            pairs = pairs or moe.pairs(self.ops, ids, weight)
            here = np.flatnonzero(np.isin(order, list(batch.slots)))
            some = self._select(pairs, here, place[order[here]])
            part = moe.through(self.ops, x, some, w13, w2, self.config.swiglu_limit, observe)
            if self.ops.lazy:
                mx.eval(part)  # bounds the decoded experts; passing slots are read no more
            rows.append(here)
            parts.append(part)
        assert pairs is not None
        back = np.argsort(np.concatenate(rows))
        return moe.combine(self.ops, self.ops.concatenate(parts)[self.ops.array(back)], pairs)

    def _select(self, pairs: moe.Pairs, rows: Ids, slots: Ids) -> moe.Pairs:
        """Some of the pairs, addressed by slot."""
        at = self.ops.array(rows)
        return replace(
            pairs,
            order=pairs.order[at],
            experts=pairs.experts[at],
            slots=self.ops.array(slots),
            weights=pairs.weights[at],
        )

    def _lay_out(
        self, layer: int, section: Section, slots: Mapping[int, int]
    ) -> tuple[PackedWeight, PackedWeight, Ids]:
        """Maps over the records of these experts, and each expert's place in them, [E].

        numpy decodes a record where it lies. MLX decodes all it is given, so it gets a copy of
        these alone.
        """
        place = np.zeros(self.config.n_routed_experts, np.int32)
        experts = list(slots)
        if not self.ops.lazy:
            place[experts] = list(slots.values())
            return (*self._maps[layer], place)
        place[experts] = np.arange(len(experts))
        records = section.pool.records[mx.array(list(slots.values()))]
        return (*maps_of(self.records[layer], records, self.config), place)

    def _look_ahead(self, running: Section, layer: int, decoding: bool) -> None:
        """Start reading what is known of the layer that comes next, and at last what the running
        one would have chosen."""
        if self._displaced:
            running.admit(self._displaced, self._now)
            self._displaced = []
        if layer >= len(self.config.layers):
            return
        section = self._section[layer]
        if not decoding:
            section.stage(layer, self._expected(layer))
        elif self._foreseen is not None:
            ranked = dict.fromkeys(np.asarray(self._foreseen).ravel().tolist())
            section.promise(layer, list(ranked), self._now)
            self._foreseen = None

    def _expected(self, layer: int) -> Sequence[int]:
        """The experts a chunk will need of a layer, as far as that is sure."""
        if layer in self._tables:
            return np.unique(self._tables[layer][self._tokens]).tolist()
        n_chosen = len(self._tokens) * self.config.num_experts_per_tok
        n_experts = self.config.n_routed_experts
        return range(n_experts) if n_chosen >= SURE * n_experts else ()


def _predict(block: Block, router: MoE, streams: Array, tokens: Array) -> Array:
    """What a layer's router would choose if its attention changed nothing: ids [S, k]."""
    x, _ = block.fused.enter(Streams(streams), block.hc_ffn, block.ffn_norm)
    return block.fused.route(x, router, tokens).ids


def _region(ops: Ops, n_slots: int, record_bytes: int) -> tuple[Array, memoryview]:
    """Memory for slots, uint8 [n_slots, record_bytes], as the kernels and as the readers see it."""
    if ops.lazy:
        records = mx.zeros((n_slots, record_bytes), mx.uint8)
        mx.eval(records)  # allocated once, and written behind MLX's back from here on
        view = np.array(records, copy=False)
        return records, view.reshape(-1).data
    pages = mmap.mmap(-1, n_slots * record_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    region = np.frombuffer(pages, np.uint8).reshape(n_slots, record_bytes)
    return region, memoryview(pages)


def _close(readers: Readers, reader: RecordReader) -> None:
    readers.close()
    reader.close()
