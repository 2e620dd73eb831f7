"""Hyper-connections: four residual streams, mixed before and after every sublayer.

Shapes: S tokens, H = hc_mult streams, D hidden. All in float32 (bf16 mixing loses two digits).
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from ds4py.kernels.build import SMALL, Launcher
from ds4py.kernels.formats import PackedMatrix
from ds4py.kernels.norm import rms_norm
from ds4py.kernels.ops import Array, Dtype, Ops, Weight


@dataclass(frozen=True)
class HyperWeights:
    """hc_{attn,ffn,head}_*: fn [2H + H*H, H*D] (head: [H, H*D]), base and scale like fn's rows."""

    fn: Weight
    base: Array
    scale: Array
    """The checkpoint's three scales (one for the head), repeated over the rows they scale."""
    norm_eps: float
    eps: float


def mix(ops: Ops, streams: Array, w: HyperWeights, iters: int) -> tuple[Array, Array, Array]:
    """streams [S, H, D] -> the sublayer's input [S, D], post [S, H], comb [S, H, H].

    comb[j, k] carries stream j into stream k; post weighs the sublayer's output. Both float32.
    """
    h = streams.shape[1]
    m = _project(ops, streams, w)
    gates = ops.sigmoid(m[:, : 2 * h])
    comb = sinkhorn(ops, m[:, 2 * h :].reshape(-1, h, h), iters, w.eps)
    return _collapse(ops, streams, gates[:, :h] + w.eps), 2 * gates[:, h:], comb


def sinkhorn(ops: Ops, logits: Array, iters: int, eps: float) -> Array:
    """[S, H, H] -> nearly doubly stochastic: softmax rows, then `iters` column steps with
    `iters` - 1 row steps between them. The last step is a column step."""
    c = ops.exp(logits - logits.max(-1, keepdims=True))
    c = c / ops.sum(c, -1, keepdims=True) + eps
    c /= ops.sum(c, -2, keepdims=True) + eps
    for _ in range(iters - 1):
        c /= ops.sum(c, -1, keepdims=True) + eps
        c /= ops.sum(c, -2, keepdims=True) + eps
    return c


def expand(ops: Ops, y: Array, streams: Array, post: Array, comb: Array) -> Array:
    """out[k] = post[k] * y + sum_j comb[j, k] * streams[j]: y [S, D] -> [S, H, D]."""
    carried = comb.swapaxes(1, 2) @ ops.cast(streams, ops.wide)
    made = post[..., None] * ops.cast(y, ops.wide)[:, None] + carried
    return ops.cast(made, streams.dtype)


def collapse_head(ops: Ops, streams: Array, w: HyperWeights) -> Array:
    """The collapse before the output norm, without Sinkhorn: [S, H, D] -> [S, D]."""
    return _collapse(ops, streams, ops.sigmoid(_project(ops, streams, w)) + w.eps)


def _project(ops: Ops, streams: Array, w: HyperWeights) -> Array:
    """Flattened streams through fn, over their root mean square, scaled and based: [S, rows]."""
    flat = ops.cast(streams.reshape(streams.shape[0], -1), ops.wide)
    rms = ops.sqrt(ops.sum(flat * flat, -1, keepdims=True) / flat.shape[1] + w.norm_eps)
    return ops.project(flat, w.fn)[0] / rms * w.scale + w.base


def _collapse(ops: Ops, streams: Array, pre: Array) -> Array:
    """sum_h pre[h] * streams[h]: [S, D] in the streams' dtype."""
    x = ops.cast(streams, ops.wide)
    return ops.cast((pre[:, None] @ x)[:, 0], streams.dtype)


def pre(
    launcher: Launcher,
    streams: Array,
    partials: Array,
    base: Array,
    scale: Array,
    norm: Array,
    epsilons: Array,
    iters: int,
) -> tuple[Array, Array]:
    """`mix` or, with iters 0, `collapse_head`, and the norm after it, in one launch.

    streams [S, H, D]; partials float32 [P, S, R + 1]: the streams' products with the R rows of fn
    and their sum of squares, in P parts; norm [D]; epsilons [3]: of the mix's norm, of the mix, of
    the norm after it. -> x [S, D] in the streams' type and gates float32: post and comb side by
    side [S, H + H*H], the head's weights [S, H].
    """
    n, h, d = streams.shape
    rows = 2 * h + h * h if iters else h
    assert h in (1, 2, 4) and d % 4 == 0 and d >= SMALL and partials.shape[1:] == (n, rows + 1)
    template = (
        ("T", streams.dtype), ("H", h), ("D", d), ("P", partials.shape[0]), ("ITERS", iters)
    )  # fmt: skip
    inputs = (streams, partials, base, scale, norm, epsilons)
    gates = (n, h + h * h if iters else h)
    outputs = (((n, d), streams.dtype), (gates, mx.float32))
    x, out = launcher.launch("hyper_pre", inputs, template, (256, n, 1), (256, 1, 1), outputs)
    return x, out


def pre_ref(
    ops: Ops, streams: Array, w: HyperWeights, norm: Array, iters: int, eps: float
) -> tuple[Array, Array]:
    """What `pre` computes, from the streams alone."""
    if iters:
        x, post, comb = mix(ops, streams, w, iters)
        gates = ops.concatenate([post, comb.reshape(comb.shape[0], -1)], axis=1)
    else:
        x = collapse_head(ops, streams, w)
        gates = ops.sigmoid(_project(ops, streams, w)) + w.eps
    return rms_norm(ops, x, norm, eps), gates


EMBED_CHANNELS = 64
"""Channels per part of the products that `embed` makes."""


def embed(
    launcher: Launcher, tokens: Array, table: PackedMatrix, fn: Array, n_streams: int, dtype: Dtype
) -> tuple[Array, Array]:
    """Rows `tokens` int32 [S] of table [V, D] once per stream, and what `pre` needs of them.

    fn [R, H*D] of any floating-point type. -> streams [S, H, D] of `dtype`, partials [P, S, R + 1].
    """
    n, d, rows = tokens.shape[0], table.n_in, fn.shape[0]
    n_parts = -(-d // EMBED_CHANNELS)
    template = (("T", dtype), ("H", n_streams), ("D", d), ("R", rows), ("F", table.code))
    outputs = (((n, n_streams, d), dtype), ((n_parts, n, rows + 1), mx.float32))
    grid = (256 * n_parts, -(-n // 8), 1)
    streams, partials = launcher.launch(
        "hyper_embed", (tokens, table.rows, fn), template, grid, (256, 1, 1), outputs
    )
    return streams, partials


def embed_ref(
    ops: Ops, tokens: Array, table: Array, w: HyperWeights, n_streams: int
) -> tuple[Array, Array]:
    """What `embed` computes, with the products in one part; streams in the table's type."""
    x = table[tokens]
    streams = ops.broadcast_to(x[:, None], (x.shape[0], n_streams, x.shape[1]))
    return streams, products(ops, streams, w)


def products(ops: Ops, streams: Array, w: HyperWeights) -> Array:
    """The streams' products with fn and their sum of squares, in one part: [1, S, R + 1]."""
    flat = streams.reshape(streams.shape[0], -1).astype(ops.wide)
    squares = (flat * flat).sum(-1, keepdims=True)
    return ops.concatenate([ops.project(flat, w.fn)[0], squares], axis=1)[None]
