"""Hyper-connections: four residual streams, mixed before and after every sublayer.

Shapes: S tokens, H = hc_mult streams, D hidden. All in float32 (bf16 mixing loses two digits).
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ds4py.kernels.dense import Dense, Weight, host_project, to_mlx, to_numpy

Mixed = tuple[mx.array, mx.array, mx.array]
"""The sublayer's input [S, D] in the streams' dtype, post [S, H] and comb [S, H, H], float32."""


@dataclass(frozen=True)
class HyperWeights:
    """hc_{attn,ffn,head}_*: fn [2H + H*H, H*D] (head: [H, H*D]), scale [3] ([1]), base like fn."""

    fn: Weight
    scale: mx.array
    base: mx.array
    norm_eps: float
    eps: float


def mix(dense: Dense, streams: mx.array, w: HyperWeights, iters: int) -> Mixed:
    """streams [S, H, D] -> what the sublayer sees, and how its output goes back.

    comb[j, k] carries stream j into stream k; `iters` Sinkhorn steps make it nearly doubly
    stochastic, ending with the columns.
    """
    return mix_host(streams, w, iters) if dense.host else mix_ref(dense, streams, w, iters)


def mix_ref(dense: Dense, streams: mx.array, w: HyperWeights, iters: int) -> Mixed:
    h = streams.shape[1]
    m = _project(dense, streams, w)
    widths = mx.concatenate([mx.full((n,), w.scale[i]) for i, n in enumerate((h, h, h * h))])
    m = m * widths + w.base
    gates = mx.sigmoid(m[:, : 2 * h])
    comb = sinkhorn(m[:, 2 * h :].reshape(-1, h, h), iters, w.eps)
    return _collapse(streams, gates[:, :h] + w.eps), 2 * gates[:, h:], comb


def mix_host(streams: mx.array, w: HyperWeights, iters: int) -> Mixed:
    """`mix_ref` in numpy: 60 operations on 24 numbers."""
    x = to_numpy(streams)
    n_tokens, h, _ = x.shape
    flat = x.reshape(n_tokens, -1)
    m = host_project(flat, w.fn)[0] / np.sqrt(
        np.mean(flat * flat, axis=-1, keepdims=True) + np.float32(w.norm_eps)
    )
    scale, base, eps = to_numpy(w.scale), to_numpy(w.base), np.float32(w.eps)
    m = m * np.repeat(scale, (h, h, h * h)) + base
    gates = 1 / (1 + np.exp(-m[:, : 2 * h]))
    c = m[:, 2 * h :].reshape(-1, h, h)
    c = np.exp(c - c.max(axis=-1, keepdims=True))
    c = c / c.sum(axis=-1, keepdims=True) + eps
    c /= c.sum(axis=-2, keepdims=True) + eps
    for _ in range(iters - 1):
        c /= c.sum(axis=-1, keepdims=True) + eps
        c /= c.sum(axis=-2, keepdims=True) + eps
    pre = gates[:, :h] + eps
    collapsed = pre[:, 0, None] * x[:, 0]
    for i in range(1, h):
        collapsed += pre[:, i, None] * x[:, i]
    return to_mlx(collapsed, streams.dtype), mx.array(2 * gates[:, h:]), mx.array(c)


def sinkhorn(logits: mx.array, iters: int, eps: float) -> mx.array:
    """[S, H, H] -> nearly doubly stochastic: softmax rows, then `iters` column steps with
    `iters` - 1 row steps between them. The last step is a column step."""
    c = mx.softmax(logits, axis=-1) + eps
    c = c / (mx.sum(c, axis=-2, keepdims=True) + eps)
    for _ in range(iters - 1):
        c = c / (mx.sum(c, axis=-1, keepdims=True) + eps)
        c = c / (mx.sum(c, axis=-2, keepdims=True) + eps)
    return c


def expand(y: mx.array, streams: mx.array, post: mx.array, comb: mx.array) -> mx.array:
    """out[k] = post[k] * y + sum_j comb[j, k] * streams[j]: y [S, D] -> [S, H, D]."""
    carried = comb.swapaxes(1, 2) @ streams.astype(mx.float32)
    return (post[..., None] * y.astype(mx.float32)[:, None] + carried).astype(streams.dtype)


def collapse_head(dense: Dense, streams: mx.array, w: HyperWeights) -> mx.array:
    """The collapse before the output norm, without Sinkhorn: [S, H, D] -> [S, D]."""
    return _collapse(streams, mx.sigmoid(_project(dense, streams, w) * w.scale + w.base) + w.eps)


def _project(dense: Dense, streams: mx.array, w: HyperWeights) -> mx.array:
    """Flattened streams through fn, over their root mean square: float32 [S, out]."""
    flat = streams.reshape(streams.shape[0], -1).astype(mx.float32)
    scale = mx.rsqrt(mx.mean(flat * flat, axis=-1, keepdims=True) + w.norm_eps)
    return dense.project(flat, w.fn)[0] * scale


def _collapse(streams: mx.array, pre: mx.array) -> mx.array:
    """sum_h pre[h] * streams[h]: [S, D] in the streams' dtype."""
    return mx.sum(pre[..., None] * streams.astype(mx.float32), axis=1).astype(streams.dtype)
