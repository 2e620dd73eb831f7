"""Pooling of token windows into compressed rows: a softmax per channel over the window."""

from __future__ import annotations

from ds4py.kernels.ops import Array, Ops


def pool(ops: Ops, u: Array, z: Array, ratio: int, overlap: int) -> Array:
    """Whole windows of values u and scores z [n_tokens, overlap*d] float32 -> rows [n, d].

    overlap 1: n_tokens = n*ratio. overlap 2: n_tokens = (n+1)*ratio; row j pools the second half
    of the channels over its own window and the first half over the window before it. A window
    before the sequence has scores -inf.
    """
    u = u.reshape(-1, ratio, u.shape[-1])
    z = z.reshape(u.shape)
    if overlap == 2:
        d = u.shape[-1] // 2
        u = ops.concatenate([u[:-1, :, :d], u[1:, :, d:]], axis=1)
        z = ops.concatenate([z[:-1, :, :d], z[1:, :, d:]], axis=1)
    weight = ops.exp(z - z.max(1, keepdims=True))
    return (weight * u).sum(1) / weight.sum(1)
