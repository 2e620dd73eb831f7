"""Choice and weights of the routed experts."""

from __future__ import annotations

import mlx.core as mx

from ds4py.kernels.build import Launcher
from ds4py.kernels.dense import scalar
from ds4py.kernels.ops import Array, Ops


def scores(ops: Ops, logits: Array) -> Array:
    """sqrt(softplus(logits)) in float32, without overflow."""
    return ops.sqrt(ops.softplus(logits))


def choose(ops: Ops, score: Array, bias: Array, n_chosen: int) -> Array:
    """The experts with the highest score + bias, ties to the lower id: [S, E] -> ids [S, k]."""
    return ops.argsort(-(score + bias), axis=1)[:, :n_chosen]


def weights(ops: Ops, score: Array, ids: Array, scaling: float) -> Array:
    """Unbiased scores of the chosen experts, normalised, times `scaling`: [S, k] float32."""
    chosen = ops.take_along_axis(score, ids, axis=1)
    return chosen / ops.sum(chosen, 1, keepdims=True) * scaling


def experts(
    launcher: Launcher,
    logits: Array,
    n_chosen: int,
    scaling: float,
    bias: Array | None,
    table: Array | None,
    tokens: Array,
) -> tuple[Array, Array]:
    """The router in one launch: logits float32 [S, E] -> ids int32 [S, k], ascending, and weights.

    bias float32 [E]: by score. table int32 [V, k]: by the token ids [S] instead.
    """
    n, n_experts = logits.shape
    assert (bias is None) != (table is None) and 1 <= n_chosen <= min(32, n_experts)
    template = (("E", n_experts), ("K", n_chosen), ("HASHED", table is not None))
    ids, weight = launcher.launch(
        "route_experts",
        (logits, bias if table is None else table, tokens, scalar(scaling)),
        template,
        (32, n, 1),
        (32, 1, 1),
        [((n, n_chosen), mx.int32), ((n, n_chosen), mx.float32)],
    )
    return ids, weight


def experts_ref(
    ops: Ops,
    logits: Array,
    n_chosen: int,
    scaling: float,
    bias: Array | None,
    table: Array | None,
    tokens: Array,
) -> tuple[Array, Array]:
    """What `experts` computes."""
    score = scores(ops, logits)
    if table is not None:
        ids = table[tokens]
    else:
        assert bias is not None
        ids = choose(ops, score, bias, n_chosen)
    ids = ops.sort(ids.astype(ops.int32), axis=1)
    return ids, weights(ops, score, ids, scaling)
