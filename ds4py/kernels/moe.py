"""The experts' feed-forward: clamped SwiGLU, routed experts summed in ascending expert id."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ds4py.kernels.ops import Array, Ops, PackedWeight, Weight

Observer = Callable[[Array, Array, Array], None]
"""Sees expert ids [R], their inputs [R, D] and the inputs of their down maps [R, I]."""


def swiglu(ops: Ops, gate: Array, up: Array, limit: float) -> Array:
    """silu(min(gate, limit)) * clip(up, +-limit), in float32."""
    gate = ops.minimum(gate.astype(ops.wide), limit)
    up = ops.minimum(ops.maximum(up.astype(ops.wide), -limit), limit)
    return gate * ops.sigmoid(gate) * up


@dataclass(frozen=True)
class Pairs:
    """The S*k (token, expert) pairs of a step, sorted by expert, so that each expert's weights
    are read once; an expert's pairs keep the order of their tokens."""

    n_chosen: int
    order: Array
    """[S*k]: where a sorted pair stood, counting each token's experts in ascending id."""
    experts: Array
    """[S*k] ids, ascending."""
    slots: Array
    """[S*k]: where the expert's weights lie."""
    weights: Array
    """[S*k]"""


def pairs(ops: Ops, ids: Array, weight: Array, slots: Array | None = None) -> Pairs:
    """ids, weight and slots [S, k]; without slots an expert's weights lie at its id."""
    by_id = ops.argsort(ids, axis=1)
    flat = ops.take_along_axis(ids, by_id, axis=1).reshape(-1)
    order = ops.argsort(flat, axis=0)
    experts = flat[order]
    if slots is not None:
        slots = ops.take_along_axis(slots, by_id, axis=1).reshape(-1)[order]
    pair_weight = ops.take_along_axis(weight, by_id, axis=1).reshape(-1)[order]
    return Pairs(ids.shape[1], order, experts, experts if slots is None else slots, pair_weight)


def through(
    ops: Ops,
    x: Array,
    pairs: Pairs,
    w13: Weight | PackedWeight,
    w2: Weight | PackedWeight,
    limit: float,
    observe: Observer | None = None,
) -> Array:
    """x [S, D] through the experts of some or all pairs -> their weighted results [R, D]."""
    x_of = x[pairs.order // pairs.n_chosen]
    gate_up = ops.experts(x_of, pairs.slots, w13)  # [R, 2I]
    n_inner = gate_up.shape[1] // 2
    h = swiglu(ops, gate_up[:, :n_inner], gate_up[:, n_inner:], limit) * pairs.weights[:, None]
    if observe is not None:
        observe(pairs.experts, x_of, h)
    return ops.experts(h.astype(x.dtype), pairs.slots, w2).astype(ops.wide)


def combine(ops: Ops, y: Array, pairs: Pairs) -> Array:
    """The sorted pairs' results [S*k, D] -> each token's sum in ascending expert id [S, D]."""
    y = y[ops.argsort(pairs.order, axis=0)]
    return y.reshape(-1, pairs.n_chosen, y.shape[1]).sum(1)


def routed(
    ops: Ops,
    x: Array,
    ids: Array,
    weight: Array,
    w13: Weight | PackedWeight,
    w2: Weight | PackedWeight,
    limit: float,
    observe: Observer | None = None,
    slots: Array | None = None,
) -> Array:
    """x [S, D], ids and weight [S, k]; w13 [n, 2I, D], w2 [n, D, I] -> float32 [S, D].

    slots [S, k] says which of the n maps is the chosen expert's; by default map e is expert e's.
    """
    chosen = pairs(ops, ids, weight, slots)
    return combine(ops, through(ops, x, chosen, w13, w2, limit, observe), chosen)
