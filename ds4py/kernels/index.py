"""The indexer's choice: which compressed rows each query attends to."""

from __future__ import annotations

from ds4py.kernels.ops import Array, Ops

TILE = 256
"""Rows scored per product; one fixed shape, so that a score does not depend on the row count."""


def scores(ops: Ops, q: Array, weights: Array, rows: Array) -> Array:
    """sum_h relu(q_h . row) * weight_h: q [S, Hi, d], weights [S, Hi], rows [n*TILE, d].

    -> float32 [S, n*TILE]. Weights may be negative.
    """
    tiles = rows.astype(ops.wide).reshape(-1, TILE, rows.shape[-1]).swapaxes(1, 2)
    s = q.astype(ops.wide)[:, None] @ tiles[None]  # [S, n, Hi, TILE]
    s = ops.maximum(s, 0) * weights[:, None, :, None]
    return s.sum(2).reshape(q.shape[0], -1)


def select(ops: Ops, score: Array, visible: Array, n_selected: int) -> tuple[Array, Array]:
    """The best `n_selected` of the visible rows, ties to the lower row, in ascending order.

    score [S, n], visible [S, 1] (how many rows each query may see) ->
    ids [S, n_selected] and valid [S, n_selected]; invalid slots are last and hold id 0.
    """
    n = score.shape[1]
    assert n > n_selected
    hidden = ops.arange(n)[None] >= visible
    order = ops.argsort(ops.where(hidden, float("inf"), -score), axis=1)[:, :n_selected]
    order = ops.sort(ops.where(order < visible, order.astype(ops.int32), n), axis=1)
    valid = order < n
    return ops.where(valid, order, 0), valid


def first(ops: Ops, visible: Array, n_selected: int) -> tuple[Array, Array]:
    """`select` where every query sees at most `n_selected` rows: all of them, no scores needed."""
    ids = ops.broadcast_to(ops.arange(n_selected), (visible.shape[0], n_selected))
    valid = ids < visible
    return ops.where(valid, ids, 0), valid
