"""The feed-forward of every layer: routed experts and one shared expert."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from ds4py.config import ModelConfig
from ds4py.kernels import moe, route
from ds4py.kernels.ops import Array, Ops, PackedWeight, Weight

ExpertWeight = Weight | PackedWeight


class ExpertSource(Protocol):
    """Where the routed experts' weights are, resident or not."""

    def routed(self, layer: int, x: Array, ids: Array, weight: Array) -> Array:
        """x [S, D] through experts ids [S, k] of `layer`, weighted: float32 [S, D]."""
        ...


class ResidentExperts:
    """All experts of all layers in memory, as float maps or packed."""

    def __init__(self, ops: Ops, swiglu_limit: float):
        self.ops, self.limit = ops, swiglu_limit
        self.weights: dict[int, tuple[ExpertWeight, ExpertWeight]] = {}
        self.observe: Callable[[int, Array, Array, Array], None] | None = None
        """Set while importance is collected: sees the layer and what `moe.Observer` sees."""

    def routed(self, layer: int, x: Array, ids: Array, weight: Array) -> Array:
        w13, w2 = self.weights[layer]
        observe = partial(self.observe, layer) if self.observe is not None else None
        return moe.routed(self.ops, x, ids, weight, w13, w2, self.limit, observe)


@dataclass(frozen=True)
class MoE:
    """Router, routed experts and the shared expert of one layer."""

    config: ModelConfig
    layer: int
    ops: Ops
    w_in: Weight
    """gate | shared w1 | shared w3"""
    shared_w2: Weight
    bias: Array | None
    """[E] float32, score-routed layers."""
    tid2eid: Array | None
    """[vocab, k] int32, hash-routed layers."""
    experts: ExpertSource

    def __call__(self, x: Array, tokens: Array) -> Array:
        """x [S, D], normed; tokens [S], the ids at these positions -> [S, D]."""
        c, ops = self.config, self.ops
        logits, gate, up = ops.project(x, self.w_in)
        score = route.scores(ops, logits)  # [S, E] float32
        if self.tid2eid is not None:
            ids = self.tid2eid[tokens]  # [S, k]
        else:
            assert self.bias is not None
            ids = route.choose(ops, score, self.bias, c.num_experts_per_tok)
        weight = route.weights(ops, score, ids, c.routed_scaling_factor)
        y = self.experts.routed(self.layer, x, ids, weight)
        h = moe.swiglu(ops, gate, up, c.swiglu_limit).astype(x.dtype)
        shared = ops.project(h, self.shared_w2)[0]
        return (y + shared.astype(ops.wide)).astype(x.dtype)
