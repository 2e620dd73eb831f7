"""Pooling of token windows into compressed rows: a softmax per channel over the window."""

from __future__ import annotations

import mlx.core as mx


def pool(u: mx.array, z: mx.array, ratio: int, overlap: int) -> mx.array:
    """Whole windows of values u and scores z [n_tokens, overlap*d] float32 -> rows [n, d].

    overlap 1: n_tokens = n*ratio. overlap 2: n_tokens = (n+1)*ratio; row j pools the second half
    of the channels over its own window and the first half over the window before it. A window
    before the sequence has scores -inf.
    """
    u = u.reshape(-1, ratio, u.shape[-1])
    z = z.reshape(u.shape)
    if overlap == 2:
        d = u.shape[-1] // 2
        u = mx.concatenate([u[:-1, :, :d], u[1:, :, d:]], axis=1)
        z = mx.concatenate([z[:-1, :, :d], z[1:, :, d:]], axis=1)
    weight = mx.exp(z - mx.max(z, axis=1, keepdims=True))
    return mx.sum(weight * u, axis=1) / mx.sum(weight, axis=1)
