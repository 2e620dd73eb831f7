"""The experts' feed-forward: clamped SwiGLU, routed experts summed in ascending expert id."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from ds4py.kernels.dense import F32, Dense, Weight, host_experts, to_mlx, to_numpy


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
    if dense.host:
        return routed_host(x, ids, weight, w13, w2, limit)
    return routed_ref(dense, x, ids, weight, w13, w2, limit)


def routed_ref(
    dense: Dense, x: mx.array, ids: mx.array, weight: mx.array, w13: Weight, w2: Weight,
    limit: float,
) -> mx.array:
    n_tokens, k = ids.shape
    by_id = mx.argsort(ids, axis=1)
    flat = mx.take_along_axis(ids, by_id, axis=1).reshape(-1)
    order = mx.argsort(flat)
    pair_weight = mx.take_along_axis(weight, by_id, axis=1).reshape(-1)[order]
    expert_of = flat[order]
    gate_up = dense.experts(x[order // k], expert_of, w13)  # [S*k, 2I]
    n_inner = gate_up.shape[1] // 2
    h = swiglu(gate_up[:, :n_inner], gate_up[:, n_inner:], limit, pair_weight[:, None])
    y = dense.experts(h.astype(x.dtype), expert_of, w2).astype(mx.float32)  # [S*k, D]
    return mx.sum(y[mx.argsort(order)].reshape(n_tokens, k, -1), axis=1)


def routed_host(
    x: mx.array, ids: mx.array, weight: mx.array, w13: Weight, w2: Weight, limit: float
) -> mx.array:
    """`routed_ref` in numpy; intermediates stay float32, so it differs where x is bfloat16."""
    rows, pair_ids = to_numpy(x), to_numpy(ids)
    n_tokens, k = pair_ids.shape
    by_id = np.argsort(pair_ids, axis=1)
    flat = np.take_along_axis(pair_ids, by_id, axis=1).reshape(-1)
    order = np.argsort(flat, kind="stable")
    pair_weight = np.take_along_axis(to_numpy(weight), by_id, axis=1).reshape(-1)[order]
    expert_of: np.ndarray[Any, Any] = flat[order]
    gate_up = host_experts(rows[order // k], expert_of, w13)
    h = _swiglu_host(gate_up, np.float32(limit)) * pair_weight[:, None]
    y = np.empty((n_tokens * k, rows.shape[1]), np.float32)
    y[order] = host_experts(h, expert_of, w2)
    y = y.reshape(n_tokens, k, -1)
    total = y[:, 0]
    for i in range(1, k):  # ascending expert id
        total = total + y[:, i]
    return to_mlx(total, mx.float32)


def _swiglu_host(gate_up: F32, limit: np.float32) -> F32:
    n_inner = gate_up.shape[1] // 2
    gate = np.minimum(gate_up[:, :n_inner], limit)
    with np.errstate(over="ignore"):  # exp of a very negative gate: sigmoid is 0 then, rightly
        return gate / (1 + np.exp(-gate)) * np.clip(gate_up[:, n_inner:], -limit, limit)
