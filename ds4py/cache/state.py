"""The state of one sequence: window rows, compressed rows, and the frontier of every compressor.

`model.step` reads it and returns a `Delta`; `SequenceState.commit` takes the first n positions of
a delta. Nothing else writes. What a commit replaces is one immutable `Frontier`, so an old one is a
checkpoint: `restore` goes back to it exactly, as long as the compressed rows below it are still
this sequence's. A fork shares those rows until one of the two writes where the other reads.

Shapes: L layers, W window, r ratio, c overlap (2 for ratio 4, else 1), d row width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from ds4py.cache.rows import RowFormats, RowStore, capacity
from ds4py.config import LayerPlan, ModelConfig
from ds4py.kernels.ops import Array
from ds4py.kernels.state import stack_ref

Stack = Callable[..., Array]
"""Layers' new rows, how many to take and to keep, the rows before them, and how many of all that
will be read: as `kernels.state.stack_ref` from its second argument on."""


@dataclass(frozen=True)
class Series:
    """Compressors with the same shape, stacked over the layers that have them."""

    name: str
    ratio: int
    overlap: int
    width: int
    """Channels of a row."""
    indexed: bool
    """Rows of the indexer; else attention rows."""
    layers: tuple[int, ...]
    """Slots in the schedule, in order; row i of a stacked array belongs to layers[i]."""

    @property
    def history(self) -> int:
        """Tokens whose values and scores the next row may still need: c*r - 1."""
        return self.overlap * self.ratio - 1

    def needed(self, position: int) -> int:
        """How many of the `history` tokens rows completed after `position` tokens still pool."""
        return position % self.ratio + (self.overlap - 1) * self.ratio

    def count(self, position: int) -> int:
        """Complete rows after `position` tokens."""
        return position // self.ratio


def series_of(config: ModelConfig, plans: Sequence[LayerPlan]) -> tuple[Series, ...]:
    """The compressor series of a schedule: attention rows per ratio, index rows for ratio 4."""
    found: list[Series] = []
    for ratio in sorted({plan.ratio for plan in plans if plan.compressed}):
        members = [(i, plan) for i, plan in enumerate(plans) if plan.ratio == ratio]
        layers, plan = tuple(i for i, _ in members), members[0][1]
        found.append(Series(f"attn{ratio}", ratio, plan.overlap, config.head_dim, False, layers))
        if plan.indexed:
            found.append(
                Series(f"index{ratio}", ratio, plan.overlap, config.index_head_dim, True, layers)
            )
    return tuple(found)


@dataclass
class LayerDelta:
    """What one layer adds for S new tokens."""

    window: Array
    """[S, width], rotated and packed."""
    read: Array = None
    """The same as plain operations read it, [S, head_dim]; None: kernels read the stored rows."""
    values: dict[str, Array] = field(default_factory=dict)
    """Per series: values and scores of the new tokens, [S, 2*c*d] float32 (scores include APE)."""
    rows: dict[str, Array] = field(default_factory=dict)
    """Per series: rows completed by the new tokens, packed, [n, width]; absent when n is 0."""


@dataclass
class Delta:
    """What one step would add to a state. Holding it changes nothing."""

    start: int
    """The state's position when the step was made."""
    n_tokens: int
    layers: list[LayerDelta]
    streams: Array
    """[S, H, D] after the last layer, before the head: the draft layer's input."""


@dataclass(frozen=True)
class Frontier:
    """Everything of a state that a commit replaces. Small, and independent of the position."""

    position: int
    """Tokens taken so far."""
    window: Array
    """The last W-1 rows of every layer as stored, oldest first, [L, W-1, width]."""
    values: dict[str, Array]
    """Per series: the last c*r - 1 tokens' values and scores, [layers, c*r - 1, 2*c*d] float32.
    Before the sequence: value 0, score -inf. A checkpoint keeps the end that is needed."""
    streams: Array
    """[1, H, D] of the last token after the last layer: the head makes the next logits of them."""

    @property
    def arrays(self) -> list[Array]:
        return [self.window, self.streams, *self.values.values()]

    @property
    def n_bytes(self) -> int:
        return sum(int(array.nbytes) for array in self.arrays)


class SequenceState:
    """The mutable state of one sequence. Not shared between threads."""

    def __init__(
        self,
        config: ModelConfig,
        plans: Sequence[LayerPlan],
        formats: RowFormats,
        stack: Stack | None = None,
    ):
        """stack: how a commit stacks layers; None: by plain operations."""
        self.ops = ops = formats.attention.ops
        self._stack = stack or partial(stack_ref, ops)
        self.series = series_of(config, plans)
        self.formats = {
            s.name: formats.index if s.indexed else formats.attention for s in self.series
        }
        self.rows = {
            s.name: RowStore(ops, len(s.layers), f.width, f.stored_dtype)
            for s, f in zip(self.series, self.formats.values(), strict=True)
        }
        self.slot = {(s.name, layer): i for s in self.series for i, layer in enumerate(s.layers)}
        self.n_main = sum(plan.index < config.num_hidden_layers for plan in plans)
        """Layers of the main model. A draft layer's window lies behind theirs."""
        self._window_format = formats.attention
        self._window_shape = (len(plans), config.sliding_window - 1, formats.attention.width)
        self._streams_shape = (1, config.hc_mult, config.hidden_size)
        self.frontier = self._empty()
        self._read: tuple[Frontier, Array] | None = None

    def _empty(self) -> Frontier:
        values = {s.name: self._before(s, s.history) for s in self.series}
        window = self.ops.zeros(self._window_shape, self._window_format.stored_dtype)
        streams = self.ops.zeros(self._streams_shape, self._window_format.dtype)
        return Frontier(0, window, values, streams)

    def _before(self, s: Series, n_tokens: int) -> Array:
        """Values and scores of tokens that pool to nothing."""
        zero = self.ops.zeros((len(s.layers), n_tokens, s.overlap * s.width), self.ops.wide)
        return self.ops.concatenate([zero, zero - float("inf")], axis=-1)

    @property
    def position(self) -> int:
        return self.frontier.position

    def window(self, layer: int) -> Array:
        """The last W-1 rows as the model reads them, [W-1, head_dim].

        All layers are unpacked at once, and a commit adds its own rows to them: one bounded copy
        for each state.
        """
        if self._read is None or self._read[0] is not self.frontier:
            self._read = self.frontier, self._window_format.unpack(self.frontier.window)
        return self._read[1][layer]

    def values(self, name: str, layer: int) -> Array:
        """One compressor's history, [c*r - 1, 2*c*d]."""
        return self.frontier.values[name][self.slot[name, layer]]

    def committed_rows(self, name: str, layer: int) -> Array:
        """One compressor's rows as stored, [capacity, width]; only the first `count(position)` mean
        anything."""
        data, slot = self.rows[name].data, self.slot[name, layer]
        return data[slot : slot + 1].reshape(data.shape[1:])  # a view: MLX copies at data[slot]

    def commit(self, delta: Delta, n_tokens: int) -> None:
        """Take the next `n_tokens` positions of a delta: its first ones, unless some were taken."""
        if n_tokens == 0:
            return
        frontier, old = self.after(delta, n_tokens), self.position
        self._read = self._read_after(delta, n_tokens, frontier)
        for s in self.series:
            n_rows = s.count(frontier.position) - s.count(old)
            n_gone = s.count(old) - s.count(delta.start)
            if n_rows:
                parts = [_rest(delta.layers[i].rows[s.name], n_gone) for i in s.layers]
                self.rows[s.name].write(s.count(old), self._stack(parts, n_rows, n_rows))
        self.frontier = frontier  # the one assignment that makes it real

    def after(self, delta: Delta, n_tokens: int) -> Frontier:
        """The frontier that `commit(delta, n_tokens)` would leave."""
        gone = self.position - delta.start
        assert 0 <= gone < gone + n_tokens <= delta.n_tokens
        old, values = self.frontier, {}
        for s in self.series:
            parts = [_rest(delta.layers[layer].values[s.name], gone) for layer in s.layers]
            n_read = s.needed(old.position + n_tokens)
            values[s.name] = self._stack(parts, n_tokens, s.history, old.values[s.name], n_read)
        parts = [_rest(part.window, gone) for part in delta.layers]
        window = self._stack(parts, n_tokens, old.window.shape[1], old.window)
        streams = delta.streams
        if delta.n_tokens > 1:
            streams = self.ops.copy(streams[gone + n_tokens - 1 : gone + n_tokens])
        return Frontier(old.position + n_tokens, window, values, streams)

    def _read_after(
        self, delta: Delta, n_tokens: int, frontier: Frontier
    ) -> tuple[Frontier, Array] | None:
        """The window rows `window` gave, and those of the delta, as it will give them then."""
        if self._read is None or self._read[0] is not self.frontier:
            return None
        window, gone = self._read[1], self.position - delta.start
        parts = [_rest(part.read, gone) for part in delta.layers]
        return frontier, self._stack(parts, n_tokens, window.shape[1], window)

    def checkpoint(self, frontier: Frontier) -> Frontier:
        """The same without what no later row needs: at multiples of every ratio, nearly nothing."""
        values = {}
        for s in self.series:
            whole, n = frontier.values[s.name], s.needed(frontier.position)
            values[s.name] = self.ops.copy(whole[:, whole.shape[1] - n :])
        return replace(frontier, values=values)

    def restore(self, frontier: Frontier) -> None:
        """Go back to an earlier frontier of this same sequence, whole or as a checkpoint."""
        values = {}
        for s in self.series:
            kept = frontier.values[s.name]
            before = self._before(s, s.history - kept.shape[1])
            values[s.name] = self.ops.concatenate([before, kept], axis=1)
        self.frontier = replace(frontier, values=values)

    def fork(self, frontier: Frontier) -> SequenceState:
        """A second sequence that begins at a frontier of this one and shares the rows below it."""
        other = copy.copy(self)
        other.rows = {
            s.name: self.rows[s.name].share(s.count(frontier.position)) for s in self.series
        }
        other.restore(frontier)
        return other

    def reset(self) -> None:
        """Back to the empty sequence."""
        self.frontier = self._empty()

    def pending(self) -> list[Array]:
        """The arrays to evaluate after a commit, so that no graph grows over steps."""
        if not self.ops.lazy:
            return []
        rows = [store.data for store in self.rows.values()]
        read = [] if self._read is None else [self._read[1]]
        return [*self.frontier.arrays, *rows, *read]

    @property
    def n_bytes(self) -> int:
        """Memory of the frontier and the rows, also those another sequence shares."""
        return self.frontier.n_bytes + sum(int(store.data.nbytes) for store in self.rows.values())

    def n_bytes_at(self, position: int) -> int:
        """What `n_bytes` would be after `position` tokens."""
        per_row = {name: store.data.shape[0] * store.row_bytes for name, store in self.rows.items()}
        rows = (capacity(s.count(position)) * per_row[s.name] for s in self.series)
        return self._empty().n_bytes + sum(rows)


def _rest(x: Array, n_gone: int) -> Array:
    """Rows that were not taken yet."""
    return x[n_gone:] if n_gone else x
