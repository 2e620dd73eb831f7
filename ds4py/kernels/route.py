"""Choice and weights of the routed experts."""

from __future__ import annotations

import mlx.core as mx


def scores(logits: mx.array) -> mx.array:
    """sqrt(softplus(logits)) in float32, without overflow."""
    return mx.sqrt(mx.logaddexp(logits, mx.array(0.0)))


def choose(score: mx.array, bias: mx.array, n_chosen: int) -> mx.array:
    """The experts with the highest score + bias, ties to the lower id: [S, E] -> ids [S, k]."""
    return mx.argsort(-(score + bias), axis=1)[:, :n_chosen]  # stable


def weights(score: mx.array, ids: mx.array, scaling: float) -> mx.array:
    """Unbiased scores of the chosen experts, normalised, times `scaling`: [S, k] float32."""
    chosen = mx.take_along_axis(score, ids, axis=1)
    return chosen / mx.sum(chosen, axis=1, keepdims=True) * scaling
