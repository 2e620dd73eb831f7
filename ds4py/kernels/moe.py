"""The experts' feed-forward: clamped SwiGLU, routed experts summed in ascending expert id."""

from __future__ import annotations

from collections.abc import Callable

from ds4py.kernels.ops import Array, Ops, PackedWeight, Weight

Observer = Callable[[Array, Array, Array], None]
"""Sees expert ids [R], their inputs [R, D] and the inputs of their down maps [R, I]."""


def swiglu(ops: Ops, gate: Array, up: Array, limit: float) -> Array:
    """silu(min(gate, limit)) * clip(up, +-limit), in float32."""
    gate = ops.minimum(gate.astype(ops.wide), limit)
    up = ops.minimum(ops.maximum(up.astype(ops.wide), -limit), limit)
    return gate * ops.sigmoid(gate) * up


def routed(
    ops: Ops,
    x: Array,
    ids: Array,
    weight: Array,
    w13: Weight | PackedWeight,
    w2: Weight | PackedWeight,
    limit: float,
    observe: Observer | None = None,
) -> Array:
    """x [S, D], ids and weight [S, k]; w13 [E, 2I, D], w2 [E, D, I] -> float32 [S, D].

    Rows are sorted by expert, so that each expert's weights are read once.
    """
    n_tokens, k = ids.shape
    by_id = ops.argsort(ids, axis=1)
    flat = ops.take_along_axis(ids, by_id, axis=1).reshape(-1)
    order = ops.argsort(flat, axis=0)
    pair_weight = ops.take_along_axis(weight, by_id, axis=1).reshape(-1)[order]
    expert_of = flat[order]
    gate_up = ops.experts(x[order // k], expert_of, w13)  # [S*k, 2I]
    n_inner = gate_up.shape[1] // 2
    h = swiglu(ops, gate_up[:, :n_inner], gate_up[:, n_inner:], limit) * pair_weight[:, None]
    if observe is not None:
        observe(expert_of, x[order // k], h)
    y = ops.experts(h.astype(x.dtype), expert_of, w2).astype(ops.wide)
    y = y[ops.argsort(order, axis=0)].reshape(n_tokens, k, -1)
    return y.sum(1)
