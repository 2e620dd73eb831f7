"""The fused operations as launches of the Metal kernels.

Weights stay in the bytes of the file: the maps that share an input are a tuple of packed matrices.
What has no kernel is computed by `Reference` with MLX's operations, on the GPU as well; `PLAIN`
lists it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from ds4py.cache.rows import attention_layout, index_layout
from ds4py.cache.state import LayerDelta
from ds4py.config import LayerPlan
from ds4py.kernels import attend, compress, dense, heads, hyper, index, matvec, moe, route, state
from ds4py.kernels.attend import StoredRows
from ds4py.kernels.build import Launcher
from ds4py.kernels.formats import PackedMatrix
from ds4py.kernels.hyper import HyperWeights
from ds4py.kernels.norm import rms_norm
from ds4py.kernels.ops import Array, Dtype
from ds4py.model.fused import Heads, Residual, Routing, Streams
from ds4py.model.reference import Reference

if TYPE_CHECKING:
    from ds4py.model.attention import Attention
    from ds4py.model.moe import MoE
    from ds4py.model.mtp import DraftLayer
    from ds4py.model.plan import Closing, StepPlan, StepPlans

Packed = tuple[PackedMatrix, ...]

PLAIN = ("experts streamed from disk, and their router", "experts while observed", "draft input")
"""What runs as plain MLX operations, wholly or in part."""


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

    def embed(self, table: Array, tokens: Array, n_streams: int, reader: HyperWeights) -> Streams:
        fn = reader.fn.arrays[0]

        def run(launcher: Launcher) -> object:
            return hyper.embed(launcher, tokens, table, fn, n_streams, self.dtype)

        return Streams(*self._launch(("embed",), tokens, (tokens,), run))

    def enter(self, streams: Streams, reader: HyperWeights, norm: Array) -> tuple[Array, Residual]:
        x, gates = self._mix(streams, reader, norm, self.config.hc_sinkhorn_iters)
        return x, Residual(streams.values, gates)

    def _mix(
        self, streams: Streams, reader: HyperWeights, norm: Array, iters: int
    ) -> tuple[Array, Array]:
        """x [S, D], normed, and the gates; iters 0: the head's form."""
        partials, eps, x = streams.partials, self.config.rms_norm_eps, streams.values
        if partials is None:
            partials = hyper.products(self.ops, x, reader)
        epsilons = numbers(reader.norm_eps, reader.eps, eps)

        def run(launcher: Launcher) -> object:
            base, scale = reader.base, reader.scale
            return hyper.pre(launcher, x, partials, base, scale, norm, epsilons, iters)

        key = ("pre", id(reader), partials.shape[0])
        collapsed, gates = self._launch(key, x, (x, partials), run)
        return collapsed, gates

    def project(self, x: Array, weight: Packed) -> Array:
        """Float32 [S, sum of out], the maps' results side by side."""
        return self._dense(x, weight)

    def queries(self, projected: Array, layer: Attention) -> Array:
        """Float32 [S, heads*hd + index heads*d]."""
        eps = self.config.rms_norm_eps
        return self._dense(projected, layer.w_q, norm=layer.q_norm, eps=eps)

    def prepare(
        self, projected: Array, queries: Array, layer: Attention, plans: StepPlans
    ) -> list[tuple[Heads, LayerDelta]]:
        if len(plans.each) == 1:
            return [self._prepare(projected, queries, layer, plans.each[0])]
        return [
            self._prepare(projected[rows], queries[rows], layer, plan)
            for plan, rows in zip(plans.each, plans.rows, strict=True)
        ]

    def _prepare(
        self, projected: Array, queries: Array, layer: Attention, plan: StepPlan
    ) -> tuple[Heads, LayerDelta]:
        main, index = layer.compressor, layer.indexer
        closing = None if main is None else plan.closing[main.series.name]
        table, step = plan.table(layer.layer), plan.origin if closing is None else closing.step

        def run(launcher: Launcher) -> object:
            return heads.prepare(
                launcher,
                self.shapes[layer.layer.ratio],
                projected,
                queries,
                table,
                layer.kv_norm,
                None if main is None else main.ape,
                None if index is None else index.ape,
                step,
                self.constants,
                self.dtype,
            )

        given = (projected, queries, table, step)
        q, row, values, index_values, *index_heads = self._launch(
            ("prepare", id(layer)), projected, given, run
        )
        delta = LayerDelta(row)
        if main is not None and closing is not None:
            delta.values[main.series.name] = values
            if index is not None:
                delta.values[index.series.name] = index_values
            if closing.n_new:
                self._pool(projected, layer, closing, delta, plan)
        return Heads(q, index_heads), delta

    def _pool(
        self,
        projected: Array,
        layer: Attention,
        closing: Closing,
        delta: LayerDelta,
        plan: StepPlan,
    ) -> None:
        """The rows that the new tokens complete go into the delta."""
        series = [c for c in (layer.compressor, layer.indexer) if c is not None]
        values = plan.state.frontier.values
        known = [compress.Frontier(values[c.series.name], c.ape, c.norm) for c in series]
        place = integers(layer.slot, plan.state.slot[series[0].series.name, layer.slot])

        def run(launcher: Launcher) -> object:
            return compress.rows(
                launcher,
                self.shapes[layer.layer.ratio],
                projected,
                closing.n_new,
                closing.table,
                known[0],
                known[1] if len(known) > 1 else None,
                place,
                closing.step,
                self.constants,
                self.dtype,
            )

        given = (projected, closing.table, closing.step, *(k.history for k in known))
        rows = self._launch(("pool", id(layer), closing.n_new), projected, given, run)
        for compressor, new in zip(series, rows, strict=False):
            delta.rows[compressor.series.name] = new

    def choose(
        self, heads: Heads, delta: LayerDelta, layer: Attention, plan: StepPlan
    ) -> Array | None:
        """int32 [S, index_topk], or None while every visible row fits."""
        if layer.indexer is None:
            return None
        name = layer.indexer.series.name
        closing = plan.closing[name]
        n_rows = closing.n_old + closing.n_new
        if n_rows <= layer.n_chosen:
            return None
        query, weights = heads.index
        committed = plan.state.rows[name].data if closing.n_old else None
        new, visible, step = delta.rows.get(name), closing.visible, closing.step
        place = integers(layer.slot, plan.state.slot[name, layer.slot])

        def run(launcher: Launcher) -> object:
            return index.search(
                launcher,
                self.shapes[layer.layer.ratio],
                query,
                weights,
                committed,
                new,
                n_rows,
                visible,
                place,
                step,
                layer.n_chosen,
            )

        given = [x for x in (query, weights, committed, new, visible, step) if x is not None]
        n_parts = n_rows // index.ROWS_PER_PART
        key = ("search", id(layer), n_parts, committed is None, new is None)
        (ids,) = self._launch(key, query, given, run)
        return ids

    def attend(
        self,
        heads: Heads,
        delta: LayerDelta,
        chosen: Array | None,
        layer: Attention,
        plan: StepPlan,
    ) -> Array:
        """[S, heads * hd]"""
        stored = self._stored_rows(delta, layer, plan)
        q, table, shape = heads.q, plan.table(layer.layer), self.shapes[layer.layer.ratio]

        def run(launcher: Launcher) -> object:
            return attend.rows(launcher, shape, q, stored, chosen, layer.sink, table)

        optional = (stored.pooled, stored.new, chosen)
        given = [q, stored.window, stored.delta, stored.visible, stored.step, table]
        n_rows = stored.n_pooled if chosen is None else min(stored.n_pooled, layer.n_chosen)
        n_parts = attend.parts(stored.window.shape[1] + 1 + n_rows, attend.MOST_PARTS)
        key = ("attend", id(layer), n_parts, *(x is None for x in optional))
        (o,) = self._launch(key, q, [*given, *(x for x in optional if x is not None)], run)
        return o

    def _stored_rows(self, delta: LayerDelta, layer: Attention, plan: StepPlan) -> StoredRows:
        window = plan.state.frontier.window
        if layer.compressor is None:
            place = integers(layer.slot, 0)
            return StoredRows(window, delta.window, None, None, 0, plan.nothing, place, plan.origin)
        name = layer.compressor.series.name
        closing = plan.closing[name]
        return StoredRows(
            window,
            delta.window,
            plan.state.rows[name].data if closing.n_old else None,
            delta.rows.get(name),
            closing.n_old + closing.n_new,
            closing.visible,
            integers(layer.slot, plan.state.slot[name, layer.slot]),
            closing.step,
        )

    def grouped(self, o: Array, weight: Packed) -> Array:
        return self._dense(o, weight, groups=self.config.o_groups, result=self.dtype)

    def leave(self, y: Array, weight: Packed, residual: Residual, reader: HyperWeights) -> Streams:
        after = dense.Residual(residual.streams, residual.gates, reader.fn.arrays[0])
        if is_step(y):
            given = (y, residual.streams, residual.gates)
            return Streams(
                *self._launch(
                    ("leave", id(weight)),
                    y,
                    given,
                    lambda on: dense.expand(on, y, weight[0], after),
                )
            )
        terms = dense.matmul(self.launcher, y, weight, self.dtype)[:, None]
        return Streams(*dense.add(self.launcher, terms, after))

    def route(self, x: Array, layer: MoE, tokens: Array) -> Routing:
        logits, c = self._dense(x, layer.w_in[:1]), self.config
        if layer.experts.prefers and layer.bias is not None:
            return self._route(logits, layer, tokens)

        def run(launcher: Launcher) -> object:
            n_chosen, scaling = c.num_experts_per_tok, c.routed_scaling_factor
            table = layer.tid2eid
            return route.experts(launcher, logits, n_chosen, scaling, layer.bias, table, tokens)

        return Routing(*self._launch(("route", id(layer)), logits, (logits, tokens), run))

    def experts(
        self, x: Array, layer: MoE, routing: Routing, residual: Residual, reader: HyperWeights
    ) -> Streams:
        placed = layer.experts.place(layer.index, routing.ids)
        if placed is None:
            return self._routed(x, layer, routing, residual)
        records, slots = placed
        after = dense.Residual(residual.streams, residual.gates, reader.fn.arrays[0])
        run, down = self.launcher, layer.shared_w2[0]
        weights, shared, limit = routing.weights, layer.w_in[1:], self.config.swiglu_limit
        if is_step(x):
            (h,) = self._launch(
                ("gate_up", id(layer), id(records)),
                x,
                (x, slots, weights),
                lambda on: moe.gate_up(on, x, records, slots, weights, shared, limit),
            )
            return Streams(
                *self._launch(
                    ("down", id(layer), id(records)),
                    h,
                    (h, slots, residual.streams, residual.gates),
                    lambda on: moe.down(on, h, records, slots, down, after),
                )
            )
        groups = moe.group(run, routing.ids, self.config.n_routed_experts)
        h = moe.matmul_gate_up(run, x, records, groups, slots, weights, shared, limit)
        terms = moe.matmul_down(run, h, records, groups, slots, down)
        return Streams(*dense.add(run, terms, after))

    def _routed(self, x: Array, layer: MoE, routing: Routing, residual: Residual) -> Streams:
        """Experts whose source computes them itself."""
        y = layer.experts.routed(layer.index, x, routing.ids, routing.weights)
        width = layer.w_in[1].rows.shape[0]
        both = self._dense(x, layer.w_in[1:])
        h = moe.swiglu(self.ops, both[:, :width], both[:, width:], self.config.swiglu_limit)
        y = y + self._dense(h.astype(x.dtype), layer.shared_w2)
        n, h, _ = residual.streams.shape
        post, comb = residual.gates[:, :h], residual.gates[:, h:].reshape(n, h, h)
        return Streams(hyper.expand(self.ops, y, residual.streams, post, comb))

    def draft(self, layer: DraftLayer, streams: Array, tokens: Array) -> Streams:
        ops, eps, (n, h, d) = self.ops, self.config.rms_norm_eps, streams.shape
        row = rms_norm(ops, layer.embed[tokens].astype(self.dtype), layer.enorm, eps)
        old = rms_norm(ops, streams, layer.hnorm, eps).reshape(n * h, d)
        new = self._dense(row, layer.e_proj).reshape(n, 1, d)
        old = self._dense(old, layer.h_proj).reshape(n, h, d)
        return Streams((new + old).astype(self.dtype))

    def head(self, streams: Streams, reader: HyperWeights, norm: Array, weight: Packed) -> mx.array:
        x, _ = self._mix(streams, reader, norm, 0)
        return self._dense(x, weight)

    def stack(
        self, layers: Sequence[Array], n_taken: int, n_kept: int, old: Array | None = None
    ) -> Array:
        if len(layers) > state.MOST_ARRAYS:  # more than one launch
            return state.stack(self.launcher, layers, n_taken, n_kept, old)
        first, given = layers[0], layers if old is None else (*layers, old)
        key = ("stack", len(layers), first.shape, first.dtype, n_taken, n_kept)
        (stacked,) = self._launch(
            key, first, given, lambda on: state.stack(on, layers, n_taken, n_kept, old)
        )
        return stacked

    def _launch(
        self,
        key: tuple[Hashable, ...],
        rows: Array,
        arrays: Sequence[Array],
        run: Callable[[Launcher], object],
    ) -> list[Array]:
        """`Launcher.replay` for steps of few rows [S, ...]; prompts are launched anew."""
        n = rows.shape[0]
        return self.launcher.replay((n, *key) if n <= matvec.MAX_ROWS else None, arrays, run)

    def _dense(self, x: Array, maps: Packed, **how: Any) -> Array:
        """x [S, in] through maps that share it; `how` as in `dense.project`."""
        product = dense.project if is_step(x) else dense.matmul
        (y,) = self._launch(
            ("dense", id(maps[0]), len(maps)),
            x,
            (x,),
            lambda on: product(on, x, maps, self.dtype, **how),
        )
        return y


def is_step(x: Array) -> bool:
    """Few rows, which share one reading of the weights; more are a prompt's."""
    return bool(x.shape[0] <= matvec.MAX_ROWS)


@cache
def integers(*values: int) -> mx.array:
    """The same for places: int32."""
    return mx.array(values, mx.int32)


@cache
def numbers(*values: float) -> mx.array:
    """Constants as the kernels take them: float32 in `constant` memory."""
    return mx.array(values, mx.float32)
