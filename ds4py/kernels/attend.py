"""Attention of many heads over one shared row per position; key and value are the same vector.

Window rows and compressed rows share one softmax with a per-head sink that only enters the
denominator. Keys come in blocks of a fixed shape, so that a query's result does not depend on
the queries computed with it or on how many rows exist beyond those it sees.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from ds4py.kernels.build import Launcher
from ds4py.kernels.heads import LayerShape
from ds4py.kernels.ops import Array, Dtype, Ops
from ds4py.kernels.rope import rotate, unfold

ROW_TILE = 32
"""Rows per block where the number of rows grows with the context (pooled layers)."""

Block = tuple[Array, Array]
"""rows [S or 1, n, R, hd] and valid [S, n, R]."""


def attend(ops: Ops, q: Array, blocks: list[Block], sink: Array) -> Array:
    """q [S, heads, hd]; sink [heads] -> [S, heads, hd] in q.dtype.

    Every query must see at least one row. Scale is hd^-0.5 with hd the whole head.
    """
    scaled = (ops.cast(q, ops.wide) * q.shape[-1] ** -0.5)[:, None]
    logits = []
    for rows, valid in blocks:
        s = scaled @ ops.cast(rows, ops.wide).swapaxes(-1, -2)  # [S, n, heads, R]
        logits.append(ops.where(valid[:, :, None], s, -float("inf")))
    top = sink[None]  # [S, heads]; the sink is one more key, so it may hold the maximum
    for s in logits:
        top = ops.maximum(top, s.max((1, 3)))
    total, out = ops.exp(sink[None] - top), ops.zeros(q.shape, ops.wide)
    for (rows, _), s in zip(blocks, logits, strict=True):
        p = ops.exp(s - top[:, None, :, None])
        total = total + ops.sum(ops.sum(p, 3), 1)
        out = out + ops.sum(p @ ops.cast(rows, ops.wide), 1)
    return ops.cast(out / total[..., None], q.dtype)


FEW_ROWS, MORE_ROWS = 320, 512
"""Up to so many rows of a query are split into parts of 32 and of 64; more into parts of 128."""
MOST_PARTS = 32
"""A query's rows are split into at most this many parts, one per lane of the second pass."""
DECODE_ROWS = 8
"""Steps of more tokens fill a GPU without splitting their rows."""


@dataclass(frozen=True)
class StoredRows:
    """The rows one layer's queries may attend to, as they lie in the state and the step's delta."""

    window: Array
    """[layers, W-1, row_width], oldest first."""
    delta: Array
    """[S, row_width]: the step's own."""
    pooled: Array | None
    """[layers, capacity, row_width]; None: no compressor, or nothing committed."""
    new: Array | None
    """[n_new, row_width]: compressed rows the step completes."""
    n_pooled: int
    """Committed and new."""
    visible: Array
    """int32 [S]: how many compressed rows each query may see; zeros without a compressor."""
    place: Array
    """int32 [2]: the layer's place in `window` and in `pooled`."""
    step: Array
    """int32 [2]: the first new token's position, and the rows committed."""


def parts_type(dtype: Dtype) -> Dtype:
    """Of the means of parts: they are read as often as rows, and rounded to `dtype` in the end."""
    return mx.float32 if dtype == mx.float32 else mx.float16


def parts(n_rows: int, most: int) -> int:
    """How many parts a query of n rows is split into; attend_split's rows_per_part."""
    size = 32 if n_rows <= FEW_ROWS else 64 if n_rows <= MORE_ROWS else 128
    while size * most < n_rows:
        size *= 2
    return -(-n_rows // size)


def rows(
    launcher: Launcher,
    shape: LayerShape,
    q: Array,
    stored: StoredRows,
    ids: Array | None,
    sink: Array,
    table: Array,
) -> Array:
    """Attention and the inverse rotation: q [S, heads, hd] -> [S, heads * hd] in q.dtype.

    ids int32 [S, k]: the compressed rows each query sees, the first min(k, visible) of them; None:
    all that are visible. table: `rope.table` of the queries' positions.

    In steps of up to DECODE_ROWS tokens a query's result does not depend on the others; the parts
    of longer steps are larger, so sums are taken in another order.
    """
    n, n_heads, hd = q.shape
    assert (n_heads, hd) == (shape.n_heads, shape.head_dim)
    most = MOST_PARTS if n <= DECODE_ROWS else 1
    n_chosen = stored.n_pooled if ids is None else min(stored.n_pooled, ids.shape[1])
    window = stored.window.shape[1] + 1
    n_parts = parts(window + n_chosen, most)
    template = (
        *(("T", q.dtype), ("P", parts_type(q.dtype))),
        *shape.row_template,
        ("NH", n_heads),
        ("W", window),
        ("K", 0 if ids is None else ids.shape[1]),
        ("SPLITS", most),
    )
    pooled = stored.window if stored.pooled is None else stored.pooled
    new = stored.delta if stored.new is None else stored.new
    inputs = (
        *(q, stored.window, stored.delta, pooled, new),
        *(stored.visible if ids is None else ids, stored.visible, sink, stored.place, stored.step),
    )
    heads = 8 if n_heads <= 8 else 16
    threads = hd // 2
    grid = (threads * -(-n_heads // heads), n_parts, n)
    shapes = ((n, n_parts, n_heads, hd), (n, n_parts, n_heads, 2))
    partials, stats = launcher.launch(
        *("attend_split", inputs, template, grid, (threads, 1, 1)),
        [(shapes[0], parts_type(q.dtype)), (shapes[1], mx.float32)],
    )
    return merge(launcher, shape, partials, stats, sink, table, q.dtype)


def merge(
    launcher: Launcher,
    shape: LayerShape,
    partials: Array,
    stats: Array,
    sink: Array,
    table: Array,
    dtype: Dtype,
) -> Array:
    """The second pass: means of parts [S, parts, heads, hd]; their maximum and sum of weights
    [S, parts, heads, 2]."""
    n, _, n_heads, hd = partials.shape
    template = (
        *(("T", dtype), ("P", partials.dtype)),
        *(("HD", hd), ("NH", n_heads), ("ROPE", shape.rope)),
    )
    (out,) = launcher.launch(
        "attend_merge",
        (partials, stats, sink, table),
        template,
        (hd // 2, n_heads, n),
        (hd // 2, 1, 1),
        [((n, n_heads * hd), dtype)],
    )
    return out


def rows_ref(ops: Ops, q: Array, blocks: list[Block], sink: Array, table: Array) -> Array:
    """What `rows` computes, of rows already unpacked."""
    o = attend(ops, q, blocks, sink)
    return rotate(ops, o, unfold(ops, table, q.shape[-1]), inverse=True).reshape(q.shape[0], -1)
