"""Pooling of token windows into compressed rows: a softmax per channel over the window."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ds4py.kernels.build import Launcher
from ds4py.kernels.heads import LayerShape
from ds4py.kernels.norm import rms_norm
from ds4py.kernels.ops import Array, Dtype, Ops
from ds4py.kernels.rope import rotate, unfold


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
    return ops.sum(weight * u, 1) / ops.sum(weight, 1)


@dataclass(frozen=True)
class Frontier:
    """One compressor's weights and the state its next rows pool over."""

    history: Array
    """float32 [layers, c*r - 1, 2*c*d]: values and scores of the tokens just before the step."""
    ape: Array
    """Bias of values and scores by place in the window, float32 [r, 2*c*d]."""
    norm: Array
    """float32 [d]"""


def rows(
    launcher: Launcher,
    shape: LayerShape,
    projected: Array,
    n_new: int,
    table: Array,
    main: Frontier,
    index: Frontier | None,
    place: Array,
    step: Array,
    constants: Array,
    dtype: Dtype,
) -> tuple[Array, Array | None]:
    """The rows that the tokens in `projected` (as in `heads.prepare`) complete, as stored.

    table: `rope.table` of the rows' first tokens' positions. place int32 [2]: the layer's place
    among all layers and in the histories; step int32 [2]: the first new position, rows before it.
    -> attention rows [n_new, row_width] and, with an indexer, index rows.
    """
    assert n_new > 0 and projected.shape[1] == shape.n_projected
    assert table.shape == (n_new, shape.rope // 2, 2)
    assert main.history.shape[1:] == (shape.overlap * shape.ratio - 1, shape.values)
    assert (index is None) == (shape.index_heads == 0)
    row_dtype = shape.row_dtype(dtype)
    template = (
        ("T", dtype),
        *shape.row_template,
        ("LATENT", shape.latent),
        ("RATIO", shape.ratio),
        ("C", shape.overlap),
        ("INDEX_DIM", shape.index_dim),
        ("TRAIL", shape.index_heads),
    )
    outputs = [
        ((n_new, shape.row_width), row_dtype),
        ((n_new, shape.index_row_width) if index else (1,), row_dtype),
    ]
    other = index or main
    inputs = (
        *(projected, main.history, other.history, main.ape, other.ape),
        *(table, main.norm, other.norm, place, step, constants),
    )
    threads = shape.head_dim // 2
    grid = (threads, 2 if index else 1, n_new)
    made = launcher.launch("compress_rows", inputs, template, grid, (threads, 1, 1), outputs)
    return made[0], made[1] if index else None


def rows_ref(
    ops: Ops,
    values: Array,
    history: Array,
    norm: Array,
    table: Array,
    ratio: int,
    overlap: int,
    start: int,
    eps: float,
    dtype: Dtype,
    pack: Callable[[Array], Array],
) -> Array:
    """One series of `rows`: values [S, 2*c*d] with their bias, history [c*r - 1, 2*c*d]."""
    n_old, n_new = start // ratio, (start + values.shape[0]) // ratio - start // ratio
    begin = ratio * (n_old - overlap + 1) - (start - (overlap * ratio - 1))
    known = ops.concatenate([history, values])[begin : begin + ratio * (n_new + overlap - 1)]
    half = known.shape[1] // 2
    row = pool(ops, known[:, :half], known[:, half:], ratio, overlap).astype(dtype)
    row = rms_norm(ops, row, norm, eps)
    return pack(rotate(ops, row, unfold(ops, table, row.shape[1])))
