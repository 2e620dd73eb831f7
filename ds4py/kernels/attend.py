"""Attention of many heads over one shared row per position; key and value are the same vector.

Window rows and compressed rows share one softmax with a per-head sink that only enters the
denominator. Keys come in blocks of a fixed shape, so that a query's result does not depend on
the queries computed with it or on how many rows exist beyond those it sees.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from ds4py.kernels.dense import F32, Dense, to_mlx, to_numpy

ROW_TILE = 32
"""Rows per block where the number of rows grows with the context (pooled layers)."""

Block = tuple[mx.array, mx.array]
"""rows [S or 1, n, R, hd] and valid [S, n, R]."""


def attend(dense: Dense, q: mx.array, blocks: list[Block], sink: mx.array) -> mx.array:
    """q [S, heads, hd]; sink [heads] -> [S, heads, hd] in q.dtype.

    Every query must see at least one row. Scale is hd^-0.5 with hd the whole head.
    """
    return attend_host(q, blocks, sink) if dense.host else attend_ref(q, blocks, sink)


def attend_ref(q: mx.array, blocks: list[Block], sink: mx.array) -> mx.array:
    scaled = q.astype(mx.float32) * (q.shape[-1] ** -0.5)
    logits = []
    for rows, valid in blocks:
        s = scaled[:, None] @ rows.astype(mx.float32).swapaxes(-1, -2)  # [S, n, heads, R]
        logits.append(mx.where(valid[:, :, None], s, -mx.inf))
    top = sink[None]  # [S, heads]; the sink is one more key, so it may hold the maximum
    for s in logits:
        top = mx.maximum(top, mx.max(s, axis=(1, 3)))
    total = mx.exp(sink[None] - top)
    out = mx.zeros(q.shape)
    for (rows, _), s in zip(blocks, logits, strict=True):
        p = mx.exp(s - top[:, None, :, None])
        total = total + mx.sum(mx.sum(p, axis=3), axis=1)
        out = out + mx.sum(p @ rows.astype(mx.float32), axis=1)
    return (out / total[..., None]).astype(q.dtype)


def attend_host(q: mx.array, blocks: list[Block], sink: mx.array) -> mx.array:
    """`attend_ref` in numpy, one BLAS call per query, block and product."""
    sinks = to_numpy(sink)
    scaled = to_numpy(q)[:, None] * np.float32(q.shape[-1] ** -0.5)
    keys = [to_numpy(rows) for rows, _ in blocks]
    logits: list[F32] = []
    for rows, (_, valid) in zip(keys, blocks, strict=True):
        s = scaled @ rows.swapaxes(-1, -2)  # [S, n, heads, R]
        logits.append(np.where(to_numpy(valid)[:, :, None], s, np.float32(-np.inf)))
    top = sinks[None]
    for s in logits:
        top = np.maximum(top, s.max(axis=(1, 3)))
    total = np.exp(sinks - top)
    out = np.zeros(q.shape, np.float32)
    for rows, s in zip(keys, logits, strict=True):
        p = np.exp(s - top[:, None, :, None])
        total += p.sum(axis=3).sum(axis=1)
        out += (p @ rows).sum(axis=1)
    return to_mlx(out / total[..., None], q.dtype)
