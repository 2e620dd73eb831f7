"""The fused operations, composed of plain array operations on numpy or MLX."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from ds4py.cache.state import LayerDelta
from ds4py.config import ModelConfig
from ds4py.kernels import attend, compress, hyper, index, moe, rounding, route, state
from ds4py.kernels.hyper import HyperWeights
from ds4py.kernels.norm import rms_norm
from ds4py.kernels.ops import Array, Dtype, LinearMaps, Ops
from ds4py.kernels.rope import rotate
from ds4py.model.fused import Residual, Routing, Streams

if TYPE_CHECKING:
    from ds4py.model.attention import Attention, Compressor
    from ds4py.model.moe import MoE
    from ds4py.model.mtp import DraftLayer
    from ds4py.model.plan import Closing, StepPlan, StepPlans


@dataclass(frozen=True)
class _Heads:
    """The queries of one layer, of one sequence."""

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
        return Streams(self.ops.broadcast_to(x[:, None], (x.shape[0], n_streams, x.shape[1])))

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
        prepared = self._prepare(inputs, queries, layer, plans)
        outputs = []
        for plan, (heads, delta) in zip(plans.each, prepared, strict=True):
            chosen = self._choose(heads, delta, layer, plan)
            outputs.append(self._attend_rows(heads, delta, chosen, layer, plan))
        o = outputs[0] if len(outputs) == 1 else self.ops.concatenate(outputs)
        return o, [delta for _, delta in prepared]

    def _prepare(
        self,
        projected: tuple[Array, ...],
        queries: tuple[Array, ...],
        layer: Attention,
        plans: StepPlans,
    ) -> list[tuple[_Heads, LayerDelta]]:
        """Queries and new rows of each sequence."""
        c, ops, eps = self.config, self.ops, self.config.rms_norm_eps
        turn = plans.turn(layer.layer)
        _, row, *inputs = projected
        query, *index_query = queries
        q = query.reshape(-1, c.num_attention_heads, c.head_dim)
        q = rotate(ops, rms_norm(ops, q, None, eps), turn)  # [S, heads, head_dim]
        row = rotate(ops, rms_norm(ops, row, layer.kv_norm, eps), turn)  # [S, head_dim]
        window = layer.rows.pack(row)
        index = (*index_query, *inputs[2:])
        values: dict[str, Array] = {}  # [value | score + APE] [S, 2*c*d] float32
        compressors = [c for c in (layer.compressor, layer.indexer) if c is not None]
        for compressor, raw in zip(compressors, inputs, strict=False):
            phase = ops.array(plans.positions % compressor.series.ratio)
            values[compressor.series.name] = raw + compressor.ape[phase]
        prepared = []
        for plan, at in zip(plans.each, plans.rows, strict=True):
            delta = LayerDelta(window[at], {name: v[at] for name, v in values.items()})
            for compressor in compressors:
                self._complete(compressor, delta, layer.slot, plan, q.dtype)
            prepared.append((_Heads(q[at], tuple(x[at] for x in index)), delta))
        return prepared

    def _complete(
        self, compressor: Compressor, delta: LayerDelta, slot: int, plan: StepPlan, dtype: Dtype
    ) -> None:
        """The rows that the new tokens complete go into the delta."""
        ops, s, closing = self.ops, compressor.series, plan.closing[compressor.series.name]
        if not closing.n_new:
            return
        values = delta.values[s.name]
        first_token = s.ratio * (closing.n_old - s.overlap + 1)  # of the oldest window needed
        begin = first_token - (plan.start - s.history)
        n_tokens = s.ratio * (closing.n_new + s.overlap - 1)
        known = ops.concatenate([plan.state.values(s.name, slot), values])  # [c*r - 1 + S, 2*c*d]
        needed = known[begin : begin + n_tokens]
        half = needed.shape[1] // 2
        row = compress.pool(ops, needed[:, :half], needed[:, half:], s.ratio, s.overlap)
        row = rms_norm(ops, row.astype(dtype), compressor.norm, self.config.rms_norm_eps)
        delta.rows[s.name] = compressor.format.pack(rotate(ops, row, closing.rotation))

    def _choose(
        self, heads: _Heads, delta: LayerDelta, layer: Attention, plan: StepPlan
    ) -> tuple[Array, Array] | None:
        """ids, valid [S, k]: k is index_topk, or as many whole tiles as there are rows; then every
        visible row fits and no scores are needed."""
        if layer.indexer is None:
            return None
        ops, s = self.ops, layer.indexer.series
        closing = plan.closing[s.name]
        n_rows = closing.n_old + closing.n_new
        if n_rows == 0:
            return None
        if n_rows <= layer.n_chosen:
            tile = _tile(layer)
            return index.first(ops, closing.visible, -(-n_rows // tile) * tile)
        q, weights = self._index_queries(heads, layer.indexer, plan)
        score = self._scores(q, weights, delta.rows.get(s.name), layer, plan)
        return index.select(ops, score, closing.visible, layer.n_chosen)

    def _index_queries(
        self, heads: _Heads, indexer: Compressor, plan: StepPlan
    ) -> tuple[Array, Array]:
        """[S, index heads, d], rotated and rounded, and the heads' weights [S, index heads]."""
        ops, (query, weights) = self.ops, heads.index
        n_heads, width = self.config.index_n_heads, indexer.series.width
        q = rotate(ops, query.reshape(-1, n_heads, width), plan.indexer)
        if indexer.format.rounded:  # else Hadamard cancels between query and row
            q = rounding.fp4_round(ops, q)
        return q, weights.astype(ops.wide) * (width * n_heads) ** -0.5

    def _scores(
        self, q: Array, weights: Array, new_rows: Array | None, layer: Attention, plan: StepPlan
    ) -> Array:
        """[S, n_old + n_new]: committed rows where they lie, new rows in tiles of their own."""
        assert layer.indexer is not None
        ops, name, unpack = self.ops, layer.indexer.series.name, layer.indexer.format.unpack
        closing, parts = plan.closing[name], []
        if closing.n_old:
            n_tiles = -(-closing.n_old // index.TILE)
            rows = plan.state.committed_rows(name, layer.slot)[: n_tiles * index.TILE]
            parts.append(index.scores(ops, q, weights, unpack(rows))[:, : closing.n_old])
        if new_rows is not None:
            rows = ops.append_zeros(new_rows, -closing.n_new % index.TILE)
            parts.append(index.scores(ops, q, weights, unpack(rows))[:, : closing.n_new])
        return parts[0] if len(parts) == 1 else ops.concatenate(parts, axis=1)

    def _attend_rows(
        self,
        heads: _Heads,
        delta: LayerDelta,
        chosen: tuple[Array, Array] | None,
        layer: Attention,
        plan: StepPlan,
    ) -> Array:
        blocks = [self._window_block(delta.window, layer, plan)]
        if layer.compressor is not None:
            closing = plan.closing[layer.compressor.series.name]
            if closing.n_old + closing.n_new:
                blocks.append(self._compressed_block(delta, chosen, layer, closing, plan))
        o = attend.attend(self.ops, heads.q, blocks, layer.sink)
        o = rotate(self.ops, o, plan.turn(layer.layer), inverse=True)
        return o.reshape(plan.n_tokens, self.config.o_groups, -1)

    def _window_block(self, new: Array, layer: Attention, plan: StepPlan) -> tuple[Array, Array]:
        """Each query's own W rows as an overlapping view: [S, 1, W, head_dim], valid [S, 1, W]."""
        recent = [plan.state.window(layer.slot), layer.rows.unpack(new)]
        rows = self.ops.concatenate(recent)  # [W-1+S, head_dim]
        width = self.config.sliding_window
        return self.ops.windows(rows, plan.n_tokens, width), plan.window_valid

    def _compressed_block(
        self,
        delta: LayerDelta,
        chosen: tuple[Array, Array] | None,
        layer: Attention,
        closing: Closing,
        plan: StepPlan,
    ) -> tuple[Array, Array]:
        """The compressed rows the queries see, from the committed ones and the step's own."""
        assert layer.compressor is not None
        name = layer.compressor.series.name
        committed, new = plan.state.committed_rows(name, layer.slot), delta.rows.get(name)
        if chosen is None:
            stored, valid = _all_rows(self.ops, committed, new, closing.n_old, closing.visible)
            return layer.rows.unpack(stored), valid
        ids, valid = chosen
        stored = committed[: closing.n_old]
        if new is not None:
            stored = self.ops.concatenate([stored, new])
        if ids.shape[0] * ids.shape[1] < stored.shape[0]:
            rows = layer.rows.unpack(stored[ids])
        else:  # many queries share rows: unpack each of them once
            rows = layer.rows.unpack(stored)[ids]
        shape = (ids.shape[0], -1, _tile(layer))
        return rows.reshape(*shape, rows.shape[2]), valid.reshape(*shape)

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
        h = moe.swiglu(ops, gate, up, self.config.swiglu_limit).astype(x.dtype)
        shared = ops.project(h, layer.shared_w2)[0]
        return self._add((y + shared.astype(ops.wide)).astype(x.dtype), residual)

    def draft(self, layer: DraftLayer, streams: Array, tokens: Array) -> Streams:
        ops, eps = self.ops, self.config.rms_norm_eps
        e = ops.project(rms_norm(ops, layer.embed[tokens], layer.enorm, eps), layer.e_proj)[0]
        h = ops.project(rms_norm(ops, streams, layer.hnorm, eps), layer.h_proj)[0]
        return Streams(e[:, None] + h)

    def head(
        self, streams: Streams, reader: HyperWeights, norm: Array, weight: LinearMaps
    ) -> mx.array:
        x = hyper.collapse_head(self.ops, streams.values, reader)
        x = rms_norm(self.ops, x, norm, reader.norm_eps)
        return self.ops.to_mlx(self.ops.project(x, weight)[0])

    def stack(
        self, layers: Sequence[Array], n_taken: int, n_kept: int, old: Array | None = None
    ) -> Array:
        return state.stack_ref(self.ops, layers, n_taken, n_kept, old)


def _all_rows(
    ops: Ops, committed: Array, new: Array | None, n_old: int, visible: Array
) -> tuple[Array, Array]:
    """Every row, tiled by its absolute number: [1, n, ROW_TILE, hd], valid [S, n, ROW_TILE]."""
    if new is not None:
        committed = ops.concatenate([committed[:n_old], new])
        n_rows = committed.shape[0]
        committed = ops.append_zeros(committed, -n_rows % attend.ROW_TILE)
    else:
        n_rows = n_old
    n_tiles = -(-n_rows // attend.ROW_TILE)
    rows = committed[: n_tiles * attend.ROW_TILE].reshape(1, n_tiles, attend.ROW_TILE, -1)
    valid = ops.arange(n_tiles * attend.ROW_TILE)[None] < visible
    return rows, valid.reshape(-1, n_tiles, attend.ROW_TILE)


def _tile(layer: Attention) -> int:
    """Chosen rows are attended in blocks of this many, a divisor of `n_chosen`."""
    return layer.n_chosen if layer.n_chosen % attend.ROW_TILE else attend.ROW_TILE
