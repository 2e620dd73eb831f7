"""The indexer's choice: which compressed rows each query attends to."""

from __future__ import annotations

import mlx.core as mx

from ds4py.kernels.build import Launcher
from ds4py.kernels.heads import LayerShape
from ds4py.kernels.ops import Array, Ops

TILE = 256
"""Rows scored per product; one fixed shape, so that a score does not depend on the row count."""


def scores(ops: Ops, q: Array, weights: Array, rows: Array) -> Array:
    """sum_h relu(q_h . row) * weight_h: q [S, Hi, d], weights [S, Hi], rows [n*TILE, d].

    -> float32 [S, n*TILE]. Weights may be negative.
    """
    tiles = ops.cast(rows, ops.wide).reshape(-1, TILE, rows.shape[-1]).swapaxes(1, 2)
    s = ops.cast(q, ops.wide)[:, None] @ tiles[None]  # [S, n, Hi, TILE]
    s = ops.maximum(s, 0) * weights[:, None, :, None]
    return ops.sum(s, 2).reshape(q.shape[0], -1)


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


TOPK_THREADS = 256
"""Threads, and rows scored per round, of the two kernels."""
ROWS_PER_PART = 512
"""Rows worth a threadgroup of their own."""
MOST_THREADGROUPS = 128
"""Of the first pass: enough for the largest GPU. It bounds the candidates, whatever the context.
At most TOPK_THREADS, for the second pass to see all parts in a round."""


def slots(n_selected: int) -> int:
    """Room of the running list: what is kept, and what may come before the next sort."""
    spare = (
        512 if n_selected <= 512 else TOPK_THREADS
    )  # 1024: 10 of the 32 KB of threadgroup memory
    return n_selected + spare


def search(
    launcher: Launcher,
    shape: LayerShape,
    query: Array,
    weights: Array,
    committed: Array | None,
    new: Array | None,
    n_rows: int,
    visible: Array,
    place: Array,
    step: Array,
    n_selected: int,
) -> Array:
    """The best `n_selected` rows each query may see, ties to the lower row: ids int32 [S, k].

    query [S, Hi, index_row_width], packed as rows are; weights float32 [S, Hi]; committed
    [layers, capacity, index_row_width] and new [n_new, index_row_width] rows as stored (None: no
    rows there), n_rows of both; visible int32 [S]; place and step as in `attend.StoredRows`. Ids
    ascend; a query that sees fewer rows has 0 in the last places.
    """
    n = query.shape[0]
    n_parts = max(1, min(n_rows // ROWS_PER_PART, MOST_THREADGROUPS // n))
    keys, ids = candidates(
        launcher, shape, query, weights, committed, new, visible, place, step, n_selected, n_parts
    )
    return merge(launcher, keys, ids)


def candidates(
    launcher: Launcher,
    shape: LayerShape,
    query: Array,
    weights: Array,
    committed: Array | None,
    new: Array | None,
    visible: Array,
    place: Array,
    step: Array,
    n_selected: int,
    n_parts: int,
) -> tuple[Array, Array]:
    """First pass: keys and ids uint32 [S, n_selected, n_parts], every part's best first."""
    n, n_heads, width = query.shape
    assert (n_heads, width) == (shape.index_heads, shape.index_row_width)
    assert weights.shape == (n, n_heads)
    some = new if committed is None else committed
    assert some is not None
    template = (
        ("T", query.dtype),
        ("D", shape.index_dim),
        ("HEADS", n_heads),
        ("K", n_selected),
        ("N", slots(n_selected)),
        ("PLAIN", not shape.native),
    )
    rows = (some[None] if some.ndim == 2 else some, some if new is None else new)
    keys, ids = launcher.launch(
        "index_candidates",
        (query, weights, *rows, visible, place, step),
        template,
        (TOPK_THREADS * n_parts, n, 1),
        (TOPK_THREADS, 1, 1),
        [((n, n_selected, n_parts), mx.uint32)] * 2,
    )
    return keys, ids


def merge(launcher: Launcher, keys: Array, ids: Array) -> Array:
    """Second pass: the parts' candidates -> ids int32 [S, k], ascending."""
    n, n_selected, _ = keys.shape
    template = (("K", n_selected), ("N", slots(n_selected)))
    grid, group = (TOPK_THREADS, n, 1), (TOPK_THREADS, 1, 1)
    outputs = [((n, n_selected), mx.int32)]
    (out,) = launcher.launch("index_merge", (keys, ids), template, grid, group, outputs)
    return out


def search_ref(
    ops: Ops, query: Array, weights: Array, rows: Array, visible: Array, n_selected: int
) -> Array:
    """What `search` computes, of rows already unpacked [n, d], n > n_selected."""
    n = rows.shape[0]
    score = scores(ops, query, weights, ops.append_zeros(rows, -n % TILE))[:, :n]
    return select(ops, score, visible[:, None], n_selected)[0]
