"""The fused operations as launches of the Metal kernels.

Weights stay in the bytes of the file: the maps that share an input are a tuple of packed matrices.
What has no kernel is computed by `Reference` with MLX's operations, on the GPU as well; `PLAIN`
lists it, and the engine's statistics show the list.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from ds4py.cache.rows import attention_layout, index_layout
from ds4py.cache.state import LayerDelta
from ds4py.config import LayerPlan
from ds4py.kernels import compress, dense, heads, hyper, matvec, moe
from ds4py.kernels.build import Launcher
from ds4py.kernels.formats import PackedMatrix
from ds4py.kernels.hyper import HyperWeights
from ds4py.kernels.norm import rms_norm
from ds4py.kernels.ops import Array, Dtype
from ds4py.model.fused import Heads, Residual, Routing, Streams
from ds4py.model.reference import Reference

if TYPE_CHECKING:
    from ds4py.model.attention import Attention, Compressor
    from ds4py.model.moe import MoE
    from ds4py.model.mtp import DraftLayer
    from ds4py.model.plan import Closing, StepPlan

Packed = tuple[PackedMatrix, ...]

PLAIN = ("choose", "attend", "leave", "route", "experts", "draft", "commit", "sample")
"""Operations that run as plain MLX operations, wholly or in part."""


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
        made = hyper.embed(self.launcher, tokens, table, reader.fn.arrays[0], n_streams, self.dtype)
        return Streams(*made)

    def enter(self, streams: Streams, reader: HyperWeights, norm: Array) -> tuple[Array, Residual]:
        x, gates = self._mix(streams, reader, norm, self.config.hc_sinkhorn_iters)
        return x, Residual(streams.values, gates)

    def _mix(
        self, streams: Streams, reader: HyperWeights, norm: Array, iters: int
    ) -> tuple[Array, Array]:
        """x [S, D], normed, and the gates; iters 0: the head's form."""
        partials, eps = streams.partials, self.config.rms_norm_eps
        if partials is None:
            partials = hyper.products(self.ops, streams.values, reader)
        epsilons = numbers(reader.norm_eps, reader.eps, eps)
        base, scale = reader.base, reader.scale
        return hyper.pre(
            self.launcher, streams.values, partials, base, scale, norm, epsilons, iters
        )

    def project(self, x: Array, weight: Packed) -> Array:
        """Float32 [S, sum of out], the maps' results side by side."""
        return self._dense(x, weight)

    def queries(self, projected: Array, layer: Attention) -> Array:
        """Float32 [S, heads*hd + index heads*d]."""
        eps = self.config.rms_norm_eps
        return self._dense(projected, layer.w_q, norm=layer.q_norm, eps=eps)

    def prepare(
        self, projected: Array, queries: Array, layer: Attention, plan: StepPlan
    ) -> tuple[Heads, LayerDelta]:
        main, index = layer.compressor, layer.indexer
        shape = self.shapes[layer.layer.ratio]
        closing = None if main is None else plan.closing[main.series.name]
        made = heads.prepare(
            self.launcher,
            shape,
            projected,
            queries,
            plan.table(layer.layer),
            layer.kv_norm,
            None if main is None else main.ape,
            None if index is None else index.ape,
            plan.origin if closing is None else closing.step,
            self.constants,
            self.dtype,
        )
        delta = LayerDelta(made.row)
        if main is not None and closing is not None:
            delta.values[main.series.name] = made.values
            if index is not None:
                delta.values[index.series.name] = made.index_values
            if closing.n_new:
                self._pool(projected, layer, closing, delta, plan)
        return Heads(made.q, (made.index_query, made.index_weights)), delta

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
        rows = compress.rows(
            self.launcher,
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
        for compressor, new in zip(series, rows, strict=False):
            delta.rows[compressor.series.name] = new

    def _index_queries(
        self, heads: Heads, indexer: Compressor, plan: StepPlan
    ) -> tuple[Array, Array]:
        query, weights = heads.index  # as `prepare` made them
        return query, weights

    def grouped(self, o: Array, weight: Packed) -> Array:
        flat = o.reshape(o.shape[0], -1)
        return self._dense(flat, weight, groups=self.config.o_groups)

    def leave(self, y: Array, weight: Packed, residual: Residual, reader: HyperWeights) -> Streams:
        return self._add(self._dense(y, weight).astype(self.dtype), residual)

    def _add(self, y: Array, residual: Residual) -> Streams:
        n, h, _ = residual.streams.shape
        post, comb = residual.gates[:, :h], residual.gates[:, h:].reshape(n, h, h)
        return Streams(hyper.expand(self.ops, y, residual.streams, post, comb))

    def route(self, x: Array, layer: MoE, tokens: Array) -> Routing:
        return self._route(self._dense(x, layer.w_in[:1]), layer, tokens)

    def experts(
        self, x: Array, layer: MoE, routing: Routing, residual: Residual, reader: HyperWeights
    ) -> Streams:
        y = layer.experts.routed(layer.index, x, routing.ids, routing.weights)
        gate, up = columns(self._dense(x, layer.w_in[1:]), [layer.w_in[1].rows.shape[0]] * 2)
        h = moe.swiglu(self.ops, gate, up, self.config.swiglu_limit).astype(x.dtype)
        return self._add((y + self._dense(h, layer.shared_w2)).astype(x.dtype), residual)

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

    def _dense(self, x: Array, maps: Packed, **how: Any) -> Array:
        """x [S, in] through maps that share it; `how` as in `dense.project`."""
        most, n = matvec.MAX_ROWS, x.shape[0]
        if n <= most:
            return dense.project(self.launcher, x, maps, self.dtype, **how)
        parts = [x[i : i + most] for i in range(0, n, most)]
        made = [dense.project(self.launcher, p, maps, self.dtype, **how) for p in parts]
        return self.ops.concatenate(made)


@cache
def integers(*values: int) -> mx.array:
    """The same for places: int32."""
    return mx.array(values, mx.int32)


@cache
def numbers(*values: float) -> mx.array:
    """Constants as the kernels take them: float32 in `constant` memory."""
    return mx.array(values, mx.float32)


def columns(x: Array, widths: list[int]) -> list[Array]:
    """x [S, sum of widths] apart."""
    return [x[:, start:end] for start, end in pairwise(accumulate(widths, initial=0))]
