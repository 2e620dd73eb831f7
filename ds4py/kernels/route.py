"""Choice and weights of the routed experts."""

from __future__ import annotations

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
    return chosen / chosen.sum(1, keepdims=True) * scaling
