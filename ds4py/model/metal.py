"""The fused operations as launches of the Metal kernels.

Weights stay in the bytes of the file: the maps that share an input are a tuple of packed matrices.
What is computed with MLX's operations instead, on the GPU as well, is counted by name in
`Launcher.plain`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx
import numpy as np

from ds4py.cache.rows import attention_layout, index_layout
from ds4py.cache.state import LayerDelta, Stack
from ds4py.config import LayerPlan
from ds4py.kernels import attend, compress, dense, heads, hyper, index, matvec, moe, route, state
from ds4py.kernels.attend import StoredRows
from ds4py.kernels.build import Launcher
from ds4py.kernels.formats import ExpertRecords, PackedMatrix
from ds4py.kernels.hyper import HyperWeights
from ds4py.kernels.ops import Array, Dtype
from ds4py.model.fused import Residual, Routing, Streams
from ds4py.model.reference import Reference

if TYPE_CHECKING:
    from ds4py.model.attention import Attention
    from ds4py.model.moe import MoE
    from ds4py.model.mtp import DraftLayer
    from ds4py.model.plan import StepPlan, StepPlans

Packed = tuple[PackedMatrix, ...]
Projected = Sequence[tuple[Array, Array]]

EXPERTS = "experts while importance is collected"
"""What runs as plain MLX operations."""


class Reads(NamedTuple):
    """What the layers of one ratio read in a step of one sequence; None: there is nothing."""

    window: Array
    """The state's window rows, [L, W-1, row_width]."""
    table: Array
    """`rope.table` of the new tokens."""
    step: Array
    """int32 [2]: the first new position, and the compressed rows committed."""
    visible: Array
    """int32 [S, 1]: compressed rows each token sees."""
    pooled: Array | None = None
    """Committed rows, [layers, capacity, row_width]."""
    indexed: Array | None = None
    """The indexer's, [layers, capacity, index_row_width]."""
    history: Array | None = None
    """What rows that close pool over: values of the tokens before, [layers, c*r - 1, 2*c*d]."""
    index_history: Array | None = None
    closing: Array | None = None
    """`rope.table` of the rows that close."""


@dataclass(frozen=True)
class View:
    """How layers of one ratio see a step of one sequence."""

    reads: Reads
    n_rows: int
    """Compressed rows, committed and new."""
    n_new: int
    n_chosen: int | None
    """How many of them the indexer leaves; None: all."""

    @cached_property
    def key(self) -> tuple[int, ...]:
        """What grids and templates follow from; with the None's among `reads`."""
        attended = self.reads.window.shape[1] + 1 + (self.n_chosen or self.n_rows)
        parts = attend.parts(attended, attend.MOST_PARTS)
        if self.n_chosen is None:
            return self.n_new, parts
        return self.n_new, parts, min(self.n_rows // index.ROWS_PER_PART, index.MOST_THREADGROUPS)


class Attended(NamedTuple):
    """What one layer makes of one sequence's tokens."""

    o: Array
    """[S, heads * hd]"""
    row: Array
    """[S, row_width]"""
    values: Array | None
    index_values: Array | None
    rows: Array | None
    """That close, [n_new, row_width]."""
    index_rows: Array | None


@dataclass(frozen=True)
class Metal(Reference):
    """`Fused` over a launcher. What each operation does is said there."""

    launcher: Launcher
    dtype: Dtype
    """Of activations."""
    native: bool
    """Rows are bytes of the trained formats."""

    @cached_property
    def shapes(self) -> dict[int, heads.LayerShape]:
        """By ratio."""
        plans = {plan.ratio: plan for plan in (*self.config.layers, *self.config.mtp_layers)}
        return {ratio: self._shape(plan) for ratio, plan in plans.items()}

    def _shape(self, plan: LayerPlan) -> heads.LayerShape:
        c = self.config
        rows, index_rows = attention_layout(c), index_layout(c)
        return heads.LayerShape(
            n_heads=c.num_attention_heads,
            head_dim=c.head_dim,
            rope=c.qk_rope_head_dim,
            latent=c.q_lora_rank,
            row_width=rows.row_bytes if self.native else c.head_dim,
            native=self.native,
            ratio=plan.ratio,
            overlap=plan.overlap,
            index_heads=c.index_n_heads if plan.indexed else 0,
            index_dim=c.index_head_dim if plan.indexed else 0,
            index_row_width=index_rows.row_bytes if self.native else c.index_head_dim,
        )

    @cached_property
    def constants(self) -> Array:
        """The norms' epsilon and the factor of the index weights."""
        c = self.config
        return numbers(c.rms_norm_eps, (c.index_head_dim * c.index_n_heads) ** -0.5)

    def embed(
        self, table: PackedMatrix, tokens: Array, n_streams: int, reader: HyperWeights
    ) -> Streams:
        def run(tokens: Array) -> Sequence[Array]:
            fn = reader.fn.arrays[0]
            return hyper.embed(self.launcher, tokens, table, fn, n_streams, self.dtype)

        return Streams(*self._replay(("embed", id(reader)), tokens, (tokens,), run))

    def enter(self, streams: Streams, reader: HyperWeights, norm: Array) -> tuple[Array, Residual]:
        def run(values: Array, partials: Array | None) -> Sequence[Array]:
            return self._mix(values, partials, reader, norm, self.config.hc_sinkhorn_iters)

        given = (streams.values, streams.partials)
        x, gates = self._replay(("enter", id(reader), given[1] is None), given[0], given, run)
        return x, Residual(streams.values, gates)

    def _mix(
        self, x: Array, partials: Array | None, reader: HyperWeights, norm: Array, iters: int
    ) -> tuple[Array, Array]:
        """Streams x [S, H, D] -> [S, D], normed, and the gates; iters 0: the head's form."""
        epsilons = numbers(reader.norm_eps, reader.eps, self.config.rms_norm_eps)
        if partials is None:  # nothing was summed for this reader: add nothing
            zero = mx.zeros((x.shape[0], 1, x.shape[2]))
            x, partials = self._sum(zero, x, passed(*x.shape[:2], 0.0), reader)
        base, scale = reader.base, reader.scale
        return hyper.pre(self.launcher, x, partials, base, scale, norm, epsilons, iters)

    def project(self, x: Array, layer: Attention, plans: StepPlans) -> Projected:
        """Of each sequence: float32 [S, sum of w_in's rows], [S, heads*hd + index heads*d]."""

        def run(x: Array) -> Projected:
            projected, eps = self._dense(x, layer.w_in), self.config.rms_norm_eps
            queries = self._dense(projected, layer.w_q, norm=layer.q_norm, eps=eps)
            if len(plans.rows) == 1:
                return [(projected, queries)]
            return [(projected[rows], queries[rows]) for rows in plans.rows]

        return self._replay(("project", id(layer), *plans.counts), x, (x,), run)

    def attend(
        self, projected: Projected, layer: Attention, plans: StepPlans
    ) -> tuple[list[Array], list[LayerDelta]]:
        """[S, heads * hd] of each sequence."""
        each = [
            self._attend(*rows, layer, plan)
            for rows, plan in zip(projected, plans.each, strict=True)
        ]
        return [o for o, _ in each], [delta for _, delta in each]

    def _attend(
        self, projected: Array, queries: Array, layer: Attention, plan: StepPlan
    ) -> tuple[Array, LayerDelta]:
        view = plan.views.get(layer.layer.ratio)
        if view is None:
            view = plan.views[layer.layer.ratio] = self._view(layer, plan)

        def run(projected: Array, queries: Array, reads: Reads) -> Attended:
            return self._attention(projected, queries, reads, layer, view)

        given = (projected, queries, view.reads)
        key = ("attend", id(layer), view.reads.pooled is None, *view.key)
        made = Attended(*self._replay(key, projected, given, run))
        delta = LayerDelta(made.row)
        for compressor, values, rows in (
            (layer.compressor, made.values, made.rows),
            (layer.indexer, made.index_values, made.index_rows),
        ):
            if compressor is not None:
                delta.values[compressor.series.name] = values
                if rows is not None:
                    delta.rows[compressor.series.name] = rows
        return made.o, delta

    def _view(self, layer: Attention, plan: StepPlan) -> View:
        window, table = plan.state.frontier.window, plan.table(layer.layer)
        if layer.compressor is None:
            return View(Reads(window, table, plan.origin, nothing(plan.n_tokens)), 0, 0, None)
        names = [c.series.name for c in (layer.compressor, layer.indexer) if c is not None]
        closing, values = plan.closing[names[0]], plan.state.frontier.values
        reads = Reads(window, table, closing.step, closing.visible)
        if closing.n_old:
            rows = [plan.state.rows[name].data for name in names]
            reads = reads._replace(**dict(zip(("pooled", "indexed"), rows, strict=False)))
        if closing.n_new:
            known = dict(zip(("history", "index_history"), map(values.get, names), strict=False))
            reads = reads._replace(closing=closing.table, **known)
        n_rows = closing.n_old + closing.n_new
        chosen = layer.n_chosen if layer.indexer and n_rows > layer.n_chosen else None
        return View(reads, n_rows, closing.n_new, chosen)

    def _attention(
        self, projected: Array, queries: Array, reads: Reads, layer: Attention, view: View
    ) -> Attended:
        """The launches of one layer for one sequence."""
        on, shape, step = self.launcher, self.shapes[layer.layer.ratio], reads.step
        main, index_ = layer.compressor, layer.indexer
        new = new_indexed = ids = None
        place = integers(layer.slot, main.series.layers.index(layer.slot) if main else 0)
        ape, index_ape = (None if c is None else c.ape for c in (main, index_))
        made = heads.prepare(
            *(on, shape, projected, queries, reads.table, layer.kv_norm),
            *(ape, index_ape, step, self.constants, self.dtype),
        )
        if view.n_new:
            known = [
                compress.Frontier(history, c.ape, c.norm)
                for c, history in ((main, reads.history), (index_, reads.index_history))
                if c is not None
            ]
            new, new_indexed = compress.rows(
                *(on, shape, projected, view.n_new, reads.closing, known[0]),
                known[1] if len(known) > 1 else None,
                *(place, step, self.constants, self.dtype),
            )
        if view.n_chosen is not None:
            ids = index.search(
                *(on, shape, made.index_query, made.index_weights, reads.indexed, new_indexed),
                *(view.n_rows, reads.visible, place, step, view.n_chosen),
            )
        stored = StoredRows(
            *(reads.window, made.row, reads.pooled, new, view.n_rows, reads.visible),
            *(place, step),
        )
        o = attend.rows(on, shape, made.q, stored, ids, layer.sink, reads.table)
        return Attended(o, made.row, made.values, made.index_values, new, new_indexed)

    def leave(
        self, attended: list[Array], layer: Attention, residual: Residual, reader: HyperWeights
    ) -> Streams:
        def run(streams: Array, gates: Array, *parts: Array) -> Sequence[Array]:
            o = parts[0] if len(parts) == 1 else mx.concatenate(list(parts))
            y = self._dense(o, layer.wo_a, groups=self.config.o_groups, result=self.dtype)
            if is_step(y):
                after = dense.Residual(streams, gates, reader.fn.arrays[0])
                return dense.expand(self.launcher, y, layer.wo_b[0], after)
            return self._sum(self._dense(y, layer.wo_b)[:, None], streams, gates, reader)

        given = (residual.streams, residual.gates, *attended)
        return Streams(*self._replay(("leave", id(layer), len(attended)), given[0], given, run))

    def route(self, x: Array, layer: MoE, tokens: Array) -> Routing:
        c = self.config

        def run(x: Array, tokens: Array) -> Sequence[Array]:
            logits = self._dense(x, layer.w_in[:1])
            n_chosen, scaling, table = c.num_experts_per_tok, c.routed_scaling_factor, layer.tid2eid
            on = self.launcher
            return *route.experts(on, logits, n_chosen, scaling, layer.bias, table, tokens), logits

        ids, weights, logits = self._replay(("route", id(layer)), x, (x, tokens), run)
        if not layer.experts.prefers or layer.bias is None:
            return Routing(ids, weights)
        score = route.scores(self.ops, logits)
        preferred = layer.experts.prefer(layer.index, score, layer.bias, ids)
        if preferred is ids:
            return Routing(ids, weights)
        rows, scaling = mx.arange(len(ids)), c.routed_scaling_factor
        n_chosen = c.num_experts_per_tok
        return Routing(
            *route.experts(self.launcher, logits, n_chosen, scaling, None, preferred, rows)
        )

    def experts(
        self, x: Array, layer: MoE, routing: Routing, residual: Residual, reader: HyperWeights
    ) -> Streams:
        placed = layer.experts.place(layer.index, routing.ids)
        if placed is None:
            return self._in_parts(x, layer, routing, residual, reader)
        experts, slots = placed
        shared, limit = layer.w_in[1:], self.config.swiglu_limit

        def run(
            x: Array, records: Array, slots: Array, weights: Array, streams: Array, gates: Array
        ) -> Sequence[Array]:
            on, down, where = self.launcher, layer.shared_w2[0], replace(experts, records=records)
            if is_step(x):
                h = moe.gate_up(on, x, where, slots, weights, shared, limit)
                after = dense.Residual(streams, gates, reader.fn.arrays[0])
                return moe.down(on, h, where, slots, down, after)
            terms = self._terms(x, layer, where, routing.ids, slots, weights, True)
            return self._sum(terms, streams, gates, reader)

        given = (x, experts.records, slots, routing.weights, residual.streams, residual.gates)
        return Streams(*self._replay(("experts", id(layer)), x, given, run))

    def _terms(
        self,
        x: Array,
        layer: MoE,
        experts: ExpertRecords,
        ids: Array,
        slots: Array,
        weights: Array,
        shared: bool,
    ) -> Array:
        """`Compute` of the source, for any S."""
        on, groups = (
            self.launcher,
            moe.group(self.launcher, ids, self.config.n_routed_experts, shared),
        )
        maps, limit = layer.w_in[1:], self.config.swiglu_limit
        h = moe.matmul_gate_up(on, x, experts, groups, slots, weights, maps, limit)
        return moe.matmul_down(on, h, experts, groups, slots, layer.shared_w2[0])

    def _in_parts(
        self, x: Array, layer: MoE, routing: Routing, residual: Residual, reader: HyperWeights
    ) -> Streams:
        """Experts that are not in memory together."""

        def compute(experts: ExpertRecords, ids: Array, slots: Array, shared: bool) -> Array:
            return self._terms(x, layer, experts, ids, slots, routing.weights, shared)

        terms = layer.experts.in_parts(layer.index, routing.ids, compute)
        if terms is None:
            terms = self._observed(x, layer, routing)
        return Streams(*self._sum(terms, residual.streams, residual.gates, reader))

    def _observed(self, x: Array, layer: MoE, routing: Routing) -> Array:
        """Experts whose source computes them itself: the routed ones' sum, the shared one's."""
        self.launcher.plain[EXPERTS] += 1
        y = layer.experts.routed(layer.index, x, routing.ids, routing.weights)
        width = layer.w_in[1].rows.shape[0]
        both = self._dense(x, layer.w_in[1:])
        h = moe.swiglu(self.ops, both[:, :width], both[:, width:], self.config.swiglu_limit)
        return mx.stack([y, self._dense(h.astype(x.dtype), layer.shared_w2)], 1)

    def draft(self, layer: DraftLayer, streams: Array, tokens: Array) -> Streams:
        eps, reader = self.config.rms_norm_eps, layer.block.hc_attn

        def run(streams: Array, tokens: Array) -> Sequence[Array]:
            n, h, d = streams.shape
            fn = reader.fn.arrays[0]
            rows, _ = hyper.embed(self.launcher, tokens, layer.embed, fn, h, self.dtype)
            new = self._dense(rows.reshape(n, h * d), layer.e_proj, norm=layer.enorm, eps=eps)
            old = streams.reshape(n * h, d)
            old = self._dense(old, layer.h_proj, norm=layer.hnorm, eps=eps, result=self.dtype)
            return self._sum(new[:, None], old.reshape(n, h, d), passed(n, h, 1.0), reader)

        return Streams(*self._replay(("draft", id(layer)), streams, (streams, tokens), run))

    def rows(self, x: Array, layer: Attention, plans: StepPlans) -> list[LayerDelta]:
        shape = replace(self.shapes[layer.layer.ratio], n_heads=0)

        def run(x: Array, *tables: Array) -> Sequence[Array]:
            on, known = self.launcher, (None, None, integers(0), self.constants)
            projected = self._dense(x, layer.w_in)
            return [
                heads.prepare(
                    on, shape, projected[at], None, table, layer.kv_norm, *known, self.dtype
                ).row
                for at, table in zip(plans.rows, tables, strict=True)
            ]

        tables = [plan.table(layer.layer) for plan in plans.each]
        made = self._replay(("rows", id(layer), *plans.counts), x, (x, *tables), run)
        return [LayerDelta(row) for row in made]

    def _sum(
        self, terms: Array, streams: Array, gates: Array, reader: HyperWeights
    ) -> tuple[Array, Array]:
        """Float32 terms [S, n, D] into the streams, and what `reader` needs of the result."""
        return dense.add(self.launcher, terms, dense.Residual(streams, gates, reader.fn.arrays[0]))

    def head(self, streams: Streams, reader: HyperWeights, norm: Array, weight: Packed) -> mx.array:
        def run(values: Array, partials: Array | None) -> Sequence[Array]:
            x, _ = self._mix(values, partials, reader, norm, 0)
            return [self._dense(x, weight)]

        given = (streams.values, streams.partials)
        (logits,) = self._replay(("head", id(reader), given[1] is None), given[0], given, run)
        return logits

    @property
    def stack(self) -> Stack:
        return self._stack

    def _stack(
        self,
        layers: Sequence[Array],
        n_taken: int,
        n_kept: int,
        old: Array | None = None,
        n_read: int | None = None,
    ) -> Array:
        def run(old: Array | None, unread: Array | None, *layers: Array) -> Sequence[Array]:
            return [state.stack(self.launcher, layers, n_taken, n_kept, old, unread)]

        unread = None if n_read is None else integers(n_kept - n_read)
        first = layers[0]
        kind = len(layers), first.shape[1:], first.dtype
        key = ("stack", *kind, n_taken, n_kept, old is None, unread is None)
        return self._replay(key, first, (old, unread, *layers), run)[0]

    def _replay(
        self,
        key: tuple[Hashable, ...],
        rows: Array,
        arrays: Sequence[Any],
        run: Callable[..., Sequence[Any]],
    ) -> Sequence[Any]:
        """`Launcher.replay` for steps of few rows [S, ...]; prompts are launched anew."""
        n = rows.shape[0]
        return self.launcher.replay((n, *key) if n <= matvec.MAX_ROWS else None, arrays, run)

    def _dense(self, x: Array, maps: Packed, **how: Any) -> Array:
        """x [S, in] through maps that share it; `how` as in `dense.project`."""
        product = dense.project if is_step(x) else dense.matmul
        return product(self.launcher, x, maps, self.dtype, **how)


def is_step(x: Array) -> bool:
    """Few rows, which share one reading of the weights; more are a prompt's."""
    return bool(x.shape[0] <= matvec.MAX_ROWS)


@cache
def integers(*values: int) -> mx.array:
    """The same for places: int32."""
    return mx.array(values, mx.int32)


@lru_cache(64)
def nothing(n: int) -> mx.array:
    """Compressed rows that n tokens see where there are none: int32 [n]."""
    return mx.array([0] * n, mx.int32)


@lru_cache(64)
def passed(n: int, n_streams: int, weight: float) -> mx.array:
    """Gates of n positions that leave the streams as they are and add `weight` times the terms."""
    row = [weight] * n_streams + np.eye(n_streams).ravel().tolist()
    return mx.array([row] * n, mx.float32)


@cache
def numbers(*values: float) -> mx.array:
    """Constants as the kernels take them: float32 in `constant` memory."""
    return mx.array(values, mx.float32)
