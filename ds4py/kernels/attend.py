"""Attention of many heads over one shared row per position; key and value are the same vector.

Window rows and compressed rows share one softmax with a per-head sink that only enters the
denominator. Keys come in blocks of a fixed shape, so that a query's result does not depend on
the queries computed with it or on how many rows exist beyond those it sees.
"""

from __future__ import annotations

from ds4py.kernels.ops import Array, Ops

ROW_TILE = 32
"""Rows per block where the number of rows grows with the context (pooled layers)."""

Block = tuple[Array, Array]
"""rows [S or 1, n, R, hd] and valid [S, n, R]."""


def attend(ops: Ops, q: Array, blocks: list[Block], sink: Array) -> Array:
    """q [S, heads, hd]; sink [heads] -> [S, heads, hd] in q.dtype.

    Every query must see at least one row. Scale is hd^-0.5 with hd the whole head.
    """
    scaled = (q.astype(ops.wide) * q.shape[-1] ** -0.5)[:, None]
    logits = []
    for rows, valid in blocks:
        s = scaled @ rows.astype(ops.wide).swapaxes(-1, -2)  # [S, n, heads, R]
        logits.append(ops.where(valid[:, :, None], s, -float("inf")))
    top = sink[None]  # [S, heads]; the sink is one more key, so it may hold the maximum
    for s in logits:
        top = ops.maximum(top, s.max((1, 3)))
    total, out = ops.exp(sink[None] - top), ops.zeros(q.shape, ops.wide)
    for (rows, _), s in zip(blocks, logits, strict=True):
        p = ops.exp(s - top[:, None, :, None])
        total = total + p.sum(3).sum(1)
        out = out + (p @ rows.astype(ops.wide)).sum(1)
    return (out / total[..., None]).astype(q.dtype)
