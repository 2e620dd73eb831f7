"""Attention of many heads over one shared row per position; key and value are the same vector.

Window rows and compressed rows share one softmax with a per-head sink that only enters the
denominator. Keys come in blocks of a fixed shape, so that a query's result does not depend on
the queries computed with it or on how many rows exist beyond those it sees.
"""

from __future__ import annotations

import mlx.core as mx

from ds4py.kernels.dense import Dense

ROW_TILE = 32
"""Rows per block where the number of rows grows with the context (pooled layers)."""


def attend(
    dense: Dense, q: mx.array, blocks: list[tuple[mx.array, mx.array]], sink: mx.array
) -> mx.array:
    """q [S, heads, hd]; each block: rows [S or 1, n, R, hd] and valid [S, n, R]; sink [heads].

    -> [S, heads, hd] in q.dtype. Every query must see at least one row. Scale is hd^-0.5 with hd
    the whole head.
    """
    q = q * (q.shape[-1] ** -0.5)
    logits = []
    for rows, valid in blocks:
        s = dense.batched(q[:, None], rows.swapaxes(-1, -2))  # [S, n, heads, R]
        logits.append(mx.where(valid[:, :, None], s, -mx.inf))
    top = sink[None]  # [S, heads]; the sink is one more key, so it may hold the maximum
    for s in logits:
        top = mx.maximum(top, mx.max(s, axis=(1, 3)))
    total = mx.exp(sink[None] - top)
    out: mx.array | None = None
    for (rows, _), s in zip(blocks, logits, strict=True):
        p = mx.exp(s - top[:, None, :, None])
        total = total + mx.sum(mx.sum(p, axis=3), axis=1)
        part = mx.sum(dense.batched(p, rows), axis=1)  # [S, heads, hd]
        out = part if out is None else out + part
    assert out is not None
    return (out / total[..., None]).astype(q.dtype)
