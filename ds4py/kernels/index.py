"""The indexer's choice: which compressed rows each query attends to."""

from __future__ import annotations

import mlx.core as mx

from ds4py.kernels.dense import Dense

TILE = 256
"""Rows scored per product; one fixed shape, so that a score does not depend on the row count."""


def scores(dense: Dense, q: mx.array, weights: mx.array, rows: mx.array) -> mx.array:
    """sum_h relu(q_h . row) * weight_h: q [S, Hi, d], weights [S, Hi], rows [n*TILE, d] -> [S, n*TILE].

    Computed and returned in float32; weights may be negative.
    """
    tiles = rows.reshape(-1, TILE, rows.shape[-1]).swapaxes(1, 2)  # [n, d, TILE]
    s = dense.batched(q[:, None], tiles[None])  # [S, n, Hi, TILE]
    s = mx.maximum(s, 0) * weights.astype(mx.float32)[:, None, :, None]
    return mx.sum(s, axis=2).reshape(q.shape[0], -1)


def select(score: mx.array, visible: mx.array, n_selected: int) -> tuple[mx.array, mx.array]:
    """The best `n_selected` of the visible rows, ties to the lower row, in ascending order.

    score [S, n], visible [S, 1] (how many rows each query may see) ->
    ids [S, n_selected] int32 and valid [S, n_selected]; invalid slots are last and hold id 0.
    """
    n = score.shape[1]
    hidden = mx.arange(n)[None] >= visible
    order = mx.argsort(mx.where(hidden, mx.inf, -score), axis=1)[:, :n_selected]  # stable
    order = mx.where(order < visible, order.astype(mx.int32), n)
    return _padded(mx.sort(order, axis=1), n, n_selected)


def first(visible: mx.array, n_selected: int) -> tuple[mx.array, mx.array]:
    """`select` where every query sees at most `n_selected` rows: all of them, no scores needed."""
    ids = mx.broadcast_to(mx.arange(n_selected, dtype=mx.int32), (visible.shape[0], n_selected))
    valid = ids < visible
    return mx.where(valid, ids, 0), valid


def _padded(ids: mx.array, n: int, n_selected: int) -> tuple[mx.array, mx.array]:
    if ids.shape[1] < n_selected:
        ids = mx.pad(ids, ((0, 0), (0, n_selected - ids.shape[1])), constant_values=n)
    valid = ids < n
    return mx.where(valid, ids, 0), valid
