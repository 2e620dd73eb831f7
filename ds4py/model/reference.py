"""The fused operations, composed of plain array operations on numpy or MLX."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from ds4py.cache.state import LayerDelta, Series, Stack
from ds4py.config import ModelConfig
from ds4py.kernels import attend, compress, hyper, index, moe, rounding, route
from ds4py.kernels.hyper import HyperWeights
from ds4py.kernels.norm import rms_norm
from ds4py.kernels.ops import Array, Dtype, LinearMaps, Ops
from ds4py.kernels.rope import rotate
from ds4py.model.fused import Residual, Routing, Streams

if TYPE_CHECKING:
    from ds4py.model.attention import Attention, Compressor
    from ds4py.model.moe import MoE
    from ds4py.model.mtp import DraftLayer
    from ds4py.model.plan import StepPlan, StepPlans


@dataclass(frozen=True)
class _Heads:
    """The queries of one layer, of all sequences."""

    q: Array
    """[S, heads, hd], normed and rotated."""
    index: tuple[Array, ...]
    """The indexer's queries and weights; empty where nothing is chosen."""


@dataclass(frozen=True)
class Reference:
    """`Fused` over any `Ops`. What each operation does is said there."""

    ops: Ops
    config: ModelConfig

    def embed(self, table: Array, tokens: Array, n_streams: int, reader: HyperWeights) -> Streams:
        x = table[tokens]  # [S, D]
        # Streams innermost: how they lie decides the order of the first layer's sums, their bits.
        return Streams(self.ops.stack([x] * n_streams, axis=2).swapaxes(1, 2))

    def enter(self, streams: Streams, reader: HyperWeights, norm: Array) -> tuple[Array, Residual]:
        x, post, comb = hyper.mix(self.ops, streams.values, reader, self.config.hc_sinkhorn_iters)
        x = rms_norm(self.ops, x, norm, reader.norm_eps)
        return x, Residual(streams.values, (post, comb))

    def project(self, x: Array, layer: Attention, plans: StepPlans) -> Any:
        """The maps' results in order: (of w_in, of w_q)."""
        projected = self.ops.project(x, layer.w_in)
        latent = rms_norm(self.ops, projected[0], layer.q_norm, self.config.rms_norm_eps)
        return projected, self.ops.project(latent, layer.w_q)  # from [S, q_lora_rank]

    def attend(
        self, projected: Any, layer: Attention, plans: StepPlans
    ) -> tuple[Array, list[LayerDelta]]:
        """[S, G, heads*hd/G]"""
        inputs, queries = projected
        heads, deltas = self._prepare(inputs, queries, layer, plans)
        blocks = [self._window_block(deltas, layer, plans)]
        if layer.compressor is not None and plans.most_rows(layer.compressor.series):
            chosen = self._chosen(heads, deltas, layer, plans)
            blocks.append(self._compressed_block(deltas, chosen, layer, plans))
        o = attend.attend(self.ops, heads.q, blocks, layer.sink)
        o = rotate(self.ops, o, plans.turn(layer.layer, self.config.head_dim), inverse=True)
        return o.reshape(o.shape[0], self.config.o_groups, -1), deltas

    def _prepare(
        self,
        projected: tuple[Array, ...],
        queries: tuple[Array, ...],
        layer: Attention,
        plans: StepPlans,
    ) -> tuple[_Heads, list[LayerDelta]]:
        """The queries, and what each sequence gets."""
        c, ops, eps = self.config, self.ops, self.config.rms_norm_eps
        _, row, *inputs = projected
        query, *index_query = queries
        q = query.reshape(-1, c.num_attention_heads, c.head_dim)
        turn = plans.turn(layer.layer, c.head_dim)
        q = rotate(ops, rms_norm(ops, q, None, eps), turn)  # [S, heads, head_dim]
        deltas = self._window_rows(row, layer, plans)
        compressors = [c for c in (layer.compressor, layer.indexer) if c is not None]
        for compressor, raw in zip(compressors, inputs, strict=False):
            phase = ops.array(plans.positions % compressor.series.ratio)
            values = raw + compressor.ape[phase]  # [value | score + APE] [S, 2*c*d] float32
            for delta, at in zip(deltas, plans.rows, strict=True):
                delta.values[compressor.series.name] = values[at]
            self._complete(compressor, deltas, layer.slot, plans, q.dtype)
        return _Heads(q, (*index_query, *inputs[2:])), deltas

    def _window_rows(self, row: Array, layer: Attention, plans: StepPlans) -> list[LayerDelta]:
        """row [S, head_dim] as projected, of all sequences."""
        row = rms_norm(self.ops, row, layer.kv_norm, self.config.rms_norm_eps)
        row = rotate(self.ops, row, plans.turn(layer.layer, self.config.head_dim))
        window = layer.rows.pack(row)
        read = layer.rows.unpack(window)
        return [LayerDelta(window[at], read[at]) for at in plans.rows]

    def _complete(
        self,
        compressor: Compressor,
        deltas: Sequence[LayerDelta],
        slot: int,
        plans: StepPlans,
        dtype: Dtype,
    ) -> None:
        """The rows that the new tokens complete go into the deltas."""
        ops, s, pooled = self.ops, compressor.series, []
        for delta, plan in zip(deltas, plans.each, strict=True):
            if plan.closing[s.name].n_new:
                pooled.append(self._pooled(s, delta.values[s.name], slot, plan))
        if not pooled:
            return
        row = ops.cast(_joined(ops, pooled), dtype)
        row = rms_norm(ops, row, compressor.norm, self.config.rms_norm_eps)
        rows, begin = compressor.format.pack(rotate(ops, row, plans.closing_turn(s))), 0
        for delta, plan in zip(deltas, plans.each, strict=True):
            if n_new := plan.closing[s.name].n_new:
                delta.rows[s.name] = rows[begin : begin + n_new]
                begin += n_new

    def _pooled(self, s: Series, values: Array, slot: int, plan: StepPlan) -> Array:
        """One sequence's windows that close, before their norm: [n_new, d]."""
        closing = plan.closing[s.name]
        first_token = s.ratio * (closing.n_old - s.overlap + 1)  # of the oldest window needed
        begin = first_token - (plan.start - s.history)
        n_tokens = s.ratio * (closing.n_new + s.overlap - 1)
        known = self.ops.concatenate([plan.state.values(s.name, slot), values])
        needed = known[begin : begin + n_tokens]  # of [c*r - 1 + S, 2*c*d]
        half = needed.shape[1] // 2
        return compress.pool(self.ops, needed[:, :half], needed[:, half:], s.ratio, s.overlap)

    def _chosen(
        self, heads: _Heads, deltas: Sequence[LayerDelta], layer: Attention, plans: StepPlans
    ) -> tuple[Array, Array] | None:
        """ids, valid [S, k]: k is index_topk, or as many whole tiles as there are rows; then every
        visible row fits and no scores are needed. None: the layer attends to all rows."""
        if layer.indexer is None:
            return None
        ops, s = self.ops, layer.indexer.series
        n_rows, visible = plans.most_rows(s), plans.visible(s)
        if n_rows <= layer.n_chosen:
            tile = _tile(layer)
            return index.first(ops, visible, -(-n_rows // tile) * tile)
        q, weights = self._index_queries(heads, layer, plans)
        score = [
            self._scores(q[at], weights[at], delta, layer, plan, n_rows)
            for delta, plan, at in zip(deltas, plans.each, plans.rows, strict=True)
        ]
        return index.select(ops, _joined(ops, score), visible, layer.n_chosen)

    def _index_queries(
        self, heads: _Heads, layer: Attention, plans: StepPlans
    ) -> tuple[Array, Array]:
        """[S, index heads, d], rotated and rounded, and the heads' weights [S, index heads]."""
        assert layer.indexer is not None
        ops, (query, weights) = self.ops, heads.index
        n_heads, width = self.config.index_n_heads, layer.indexer.series.width
        q = rotate(ops, query.reshape(-1, n_heads, width), plans.turn(layer.layer, width))
        if layer.indexer.format.rounded:  # else Hadamard cancels between query and row
            q = rounding.fp4_round(ops, q)
        return q, ops.cast(weights, ops.wide) * (width * n_heads) ** -0.5

    def _scores(
        self,
        q: Array,
        weights: Array,
        delta: LayerDelta,
        layer: Attention,
        plan: StepPlan,
        n_rows: int,
    ) -> Array:
        """One sequence's [S, n_rows], zeros beyond its rows: committed rows where they lie, new
        rows in tiles of their own."""
        assert layer.indexer is not None
        ops, name, unpack = self.ops, layer.indexer.series.name, layer.indexer.format.unpack
        closing, new, parts = plan.closing[name], delta.rows.get(name), []
        if closing.n_old:
            n_tiles = -(-closing.n_old // index.TILE)
            rows = plan.state.committed_rows(name, layer.slot)[: n_tiles * index.TILE]
            parts.append(index.scores(ops, q, weights, unpack(rows))[:, : closing.n_old])
        if new is not None:
            rows = ops.append_zeros(new, -closing.n_new % index.TILE)
            parts.append(index.scores(ops, q, weights, unpack(rows))[:, : closing.n_new])
        if closing.n_rows < n_rows:
            parts.append(ops.zeros((q.shape[0], n_rows - closing.n_rows), ops.wide))
        return _joined(ops, parts, axis=1)

    def _window_block(
        self, deltas: Sequence[LayerDelta], layer: Attention, plans: StepPlans
    ) -> tuple[Array, Array]:
        """Each query's own W rows as an overlapping view: [S, 1, W, head_dim], valid [S, 1, W]."""
        ops, width, blocks = self.ops, self.config.sliding_window, []
        for delta, plan in zip(deltas, plans.each, strict=True):
            rows = ops.concatenate([plan.state.window(layer.slot), delta.read])
            blocks.append(ops.windows(rows, plan.n_tokens, width))  # of [W-1+S, head_dim]
        return _joined(ops, blocks), plans.window_valid

    def _compressed_block(
        self,
        deltas: Sequence[LayerDelta],
        chosen: tuple[Array, Array] | None,
        layer: Attention,
        plans: StepPlans,
    ) -> tuple[Array, Array]:
        """The compressed rows the queries see, from the committed ones and the step's own: tiles
        [S or 1, n, R, head_dim], valid [S, n, R]."""
        assert layer.compressor is not None
        ops, s, tile = self.ops, layer.compressor.series, _tile(layer)
        if chosen is None:
            n_rows = -(-plans.most_rows(s) // tile) * tile
            rows = layer.rows.unpack(ops.stack(self._stored(deltas, layer, plans, n_rows)))
            rows = rows.reshape(len(plans.each), -1, tile, rows.shape[2])
            if 1 < len(plans.each) < plans.n_tokens:
                rows = rows[plans.sequence]
            valid = ops.arange(n_rows)[None] < plans.visible(s)
            return rows, valid.reshape(plans.n_tokens, -1, tile)
        ids, valid = chosen
        stored = self._stored(deltas, layer, plans)
        if ids.shape[0] * ids.shape[1] < sum(part.shape[0] for part in stored):
            each = [part[ids[at]] for part, at in zip(stored, plans.rows, strict=True)]
            rows = layer.rows.unpack(_joined(ops, each))
        else:  # many queries share rows: unpack each of them once
            parts = [layer.rows.unpack(part) for part in stored]
            each = [part[ids[at]] for part, at in zip(parts, plans.rows, strict=True)]
            rows = _joined(ops, each)
        shape = (ids.shape[0], -1, tile)
        return rows.reshape(*shape, rows.shape[2]), valid.reshape(*shape)

    def _stored(
        self,
        deltas: Sequence[LayerDelta],
        layer: Attention,
        plans: StepPlans,
        n_rows: int | None = None,
    ) -> list[Array]:
        """Each sequence's compressed rows as stored, with the step's own; zeros where it has fewer
        than n_rows (None: one, to have something to point at)."""
        assert layer.compressor is not None
        ops, name, found = self.ops, layer.compressor.series.name, []
        for delta, plan in zip(deltas, plans.each, strict=True):
            rows, new = plan.state.committed_rows(name, layer.slot), delta.rows.get(name)
            closing = plan.closing[name]
            if new is not None or n_rows is None:
                rows = rows[: closing.n_old]
            if new is not None:
                rows = ops.concatenate([rows, new])
            wanted = max(1, closing.n_rows) if n_rows is None else n_rows
            found.append(ops.append_zeros(rows[:wanted], max(0, wanted - rows.shape[0])))
        return found

    def leave(
        self, attended: Array, layer: Attention, residual: Residual, reader: HyperWeights
    ) -> Streams:
        y = self.ops.grouped(attended, layer.wo_a).reshape(attended.shape[0], -1)  # [S, G*o_lora]
        return self._add(self.ops.project(y, layer.wo_b)[0], residual)

    def _add(self, y: Array, residual: Residual) -> Streams:
        """y [S, D] into the streams."""
        return Streams(hyper.expand(self.ops, y, residual.streams, *residual.gates))

    def route(self, x: Array, layer: MoE, tokens: Array) -> Routing:
        logits, *shared = self.ops.project(x, layer.w_in)
        return self._route(logits, layer, tokens, shared)

    def _route(self, logits: Array, layer: MoE, tokens: Array, shared: Any = None) -> Routing:
        c, ops = self.config, self.ops
        score = route.scores(ops, logits)  # [S, E] float32
        if layer.tid2eid is not None:
            ids = layer.tid2eid[tokens]  # [S, k]
        else:
            assert layer.bias is not None
            ids = route.choose(ops, score, layer.bias, c.num_experts_per_tok)
            ids = layer.experts.prefer(layer.index, score, layer.bias, ids)
        weights = route.weights(ops, score, ids, c.routed_scaling_factor)
        return Routing(ids, weights, shared)

    def experts(
        self, x: Array, layer: MoE, routing: Routing, residual: Residual, reader: HyperWeights
    ) -> Streams:
        ops = self.ops
        y = layer.experts.routed(layer.index, x, routing.ids, routing.weights)
        gate, up = routing.shared
        h = moe.swiglu(ops, gate, up, self.config.swiglu_limit)
        shared = ops.project(ops.cast(h, x.dtype), layer.shared_w2)[0]
        return self._add(ops.cast(y + ops.cast(shared, ops.wide), x.dtype), residual)

    def draft(self, layer: DraftLayer, streams: Array, tokens: Array) -> Streams:
        ops, eps = self.ops, self.config.rms_norm_eps
        e = ops.project(rms_norm(ops, layer.embed[tokens], layer.enorm, eps), layer.e_proj)[0]
        h = ops.project(rms_norm(ops, streams, layer.hnorm, eps), layer.h_proj)[0]
        return Streams(e[:, None] + h)

    def rows(self, x: Array, layer: Attention, plans: StepPlans) -> list[LayerDelta]:
        _, row = self.ops.project(x, layer.w_in)
        return self._window_rows(row, layer, plans)

    def head(
        self, streams: Streams, reader: HyperWeights, norm: Array, weight: LinearMaps
    ) -> mx.array:
        x = hyper.collapse_head(self.ops, streams.values, reader)
        x = rms_norm(self.ops, x, norm, reader.norm_eps)
        return self.ops.to_mlx(self.ops.project(x, weight)[0])

    @property
    def stack(self) -> Stack | None:
        return None


def _joined(ops: Ops, parts: Sequence[Array], axis: int = 0) -> Array:
    return parts[0] if len(parts) == 1 else ops.concatenate(parts, axis=axis)


def _tile(layer: Attention) -> int:
    """Compressed rows are attended in blocks of this many, a divisor of `n_chosen` where rows are
    chosen."""
    if layer.indexer is None or layer.n_chosen % attend.ROW_TILE == 0:
        return attend.ROW_TILE
    return layer.n_chosen
