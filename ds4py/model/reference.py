"""The fused operations, composed of plain array operations on numpy or MLX."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx

from ds4py.config import ModelConfig
from ds4py.kernels import hyper, moe, route
from ds4py.kernels.hyper import HyperWeights
from ds4py.kernels.norm import rms_norm
from ds4py.kernels.ops import Array, Ops, Weight
from ds4py.model.fused import Residual, Routing, Streams

if TYPE_CHECKING:
    from ds4py.model.moe import MoE
    from ds4py.model.mtp import DraftLayer


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

    def leave(self, y: Array, weight: Weight, residual: Residual, reader: HyperWeights) -> Streams:
        return self._add(self.ops.project(y, weight)[0], residual)

    def _add(self, y: Array, residual: Residual) -> Streams:
        """y [S, D] into the streams."""
        return Streams(hyper.expand(self.ops, y, residual.streams, *residual.gates))

    def route(self, x: Array, layer: MoE, tokens: Array) -> Routing:
        c, ops = self.config, self.ops
        logits, *shared = ops.project(x, layer.w_in)
        score = route.scores(ops, logits)  # [S, E] float32
        if layer.tid2eid is not None:
            ids = layer.tid2eid[tokens]  # [S, k]
        else:
            assert layer.bias is not None
            ids = route.choose(ops, score, layer.bias, c.num_experts_per_tok)
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

    def head(self, streams: Streams, reader: HyperWeights, norm: Array, weight: Weight) -> mx.array:
        x = hyper.collapse_head(self.ops, streams.values, reader)
        x = rms_norm(self.ops, x, norm, reader.norm_eps)
        return self.ops.to_mlx(self.ops.project(x, weight)[0])
