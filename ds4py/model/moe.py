"""The feed-forward of every layer: routed experts and one shared expert."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

from ds4py.config import ModelConfig
from ds4py.kernels import moe, route
from ds4py.kernels.dense import Dense, Weight


class ExpertSource(Protocol):
    """Where the routed experts' weights are, resident or not."""

    def routed(self, layer: int, x: mx.array, ids: mx.array, weight: mx.array) -> mx.array:
        """x [S, D] through experts ids [S, k] of `layer`, weighted: float32 [S, D]."""
        ...


class ResidentExperts:
    """All experts of all layers in memory."""

    def __init__(self, dense: Dense, swiglu_limit: float):
        self.dense, self.limit = dense, swiglu_limit
        self.weights: dict[int, tuple[Weight, Weight]] = {}

    def routed(self, layer: int, x: mx.array, ids: mx.array, weight: mx.array) -> mx.array:
        w13, w2 = self.weights[layer]
        return moe.routed(self.dense, x, ids, weight, w13, w2, self.limit)


@dataclass(frozen=True)
class MoE:
    """Router, routed experts and the shared expert of one layer."""

    config: ModelConfig
    layer: int
    dense: Dense
    w_in: Weight
    """gate | shared w1 | shared w3"""
    shared_w2: Weight
    bias: mx.array | None
    """[E] float32, score-routed layers."""
    tid2eid: mx.array | None
    """[vocab, k] int32, hash-routed layers."""
    experts: ExpertSource

    def __call__(self, x: mx.array, tokens: mx.array) -> mx.array:
        """x [S, D], normed; tokens [S], the ids at these positions -> [S, D]."""
        c = self.config
        logits, gate, up = self.dense.project(x, self.w_in)
        score = route.scores(logits)  # [S, E] float32
        if self.tid2eid is not None:
            ids = self.tid2eid[tokens]  # [S, k]
        else:
            assert self.bias is not None
            ids = route.choose(score, self.bias, c.num_experts_per_tok)
        weight = route.weights(score, ids, c.routed_scaling_factor)
        y = self.experts.routed(self.layer, x, ids, weight)
        h = moe.swiglu(gate, up, c.swiglu_limit, None).astype(x.dtype)
        shared = self.dense.project(h, self.shared_w2)[0]
        return (y + shared.astype(mx.float32)).astype(x.dtype)
