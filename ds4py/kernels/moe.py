"""The experts' feed-forward: clamped SwiGLU, routed experts summed in ascending expert id."""

from __future__ import annotations

import mlx.core as mx

from ds4py.kernels.dense import Dense, Weight


def swiglu(gate: mx.array, up: mx.array, limit: float, weight: mx.array | None) -> mx.array:
    """silu(min(gate, limit)) * clip(up, +-limit) * weight, in float32. weight [R, 1] or None."""
    gate = mx.minimum(gate.astype(mx.float32), limit)
    up = mx.clip(up.astype(mx.float32), -limit, limit)
    h = gate * mx.sigmoid(gate) * up
    return h if weight is None else h * weight


def routed(
    dense: Dense, x: mx.array, ids: mx.array, weight: mx.array, w13: Weight, w2: Weight,
    limit: float,
) -> mx.array:
    """x [S, D], ids and weight [S, k]; w13 [E, 2I, D], w2 [E, D, I] -> float32 [S, D].

    Rows are sorted by expert, so that each expert's weights are read once.
    """
    n_tokens, k = ids.shape
    by_id = mx.argsort(ids, axis=1)
    flat = mx.take_along_axis(ids, by_id, axis=1).reshape(-1)
    order = mx.argsort(flat) if n_tokens > 1 else mx.arange(k)
    pair_weight = mx.take_along_axis(weight, by_id, axis=1).reshape(-1)[order]
    expert_of = flat[order]
    gate_up = dense.experts(x[order // k], expert_of, w13)  # [S*k, 2I]
    n_inner = gate_up.shape[1] // 2
    h = swiglu(gate_up[:, :n_inner], gate_up[:, n_inner:], limit, pair_weight[:, None])
    y = dense.experts(h.astype(x.dtype), expert_of, w2).astype(mx.float32)  # [S*k, D]
    return mx.sum(y[mx.argsort(order)].reshape(n_tokens, k, -1), axis=1)
