"""Hyper-connections: four residual streams, mixed before and after every sublayer.

Shapes: S tokens, H = hc_mult streams, D hidden. All in float32 (bf16 mixing loses two digits).
"""

from __future__ import annotations

import mlx.core as mx


def split_mix(
    m: mx.array, scale: mx.array, base: mx.array, n_streams: int, iters: int, eps: float
) -> tuple[mx.array, mx.array, mx.array]:
    """Projected mix m [S, 2H + H*H] -> pre [S, H], post [S, H], comb [S, H, H].

    scale [3] and base [2H + H*H] are float32. comb[j, k] carries stream j into stream k.
    """
    h = n_streams
    widths = mx.concatenate([mx.broadcast_to(scale[i], (n,)) for i, n in enumerate((h, h, h * h))])
    m = m * widths + base
    gates = mx.sigmoid(m[:, : 2 * h])
    comb = m[:, 2 * h :].reshape(-1, h, h)
    return gates[:, :h] + eps, 2 * gates[:, h:], sinkhorn(comb, iters, eps)


def sinkhorn(logits: mx.array, iters: int, eps: float) -> mx.array:
    """[S, H, H] -> nearly doubly stochastic: softmax rows, then `iters` column steps with
    `iters` - 1 row steps between them. The last step is a column step."""
    c = mx.softmax(logits, axis=-1) + eps
    c = c / (mx.sum(c, axis=-2, keepdims=True) + eps)
    for _ in range(iters - 1):
        c = c / (mx.sum(c, axis=-1, keepdims=True) + eps)
        c = c / (mx.sum(c, axis=-2, keepdims=True) + eps)
    return c


def collapse(streams: mx.array, pre: mx.array) -> mx.array:
    """sum_h pre[h] * streams[h]: [S, H, D], [S, H] -> [S, D] in the streams' dtype."""
    return mx.sum(pre[..., None] * streams.astype(mx.float32), axis=1).astype(streams.dtype)


def expand(y: mx.array, streams: mx.array, post: mx.array, comb: mx.array) -> mx.array:
    """out[k] = post[k] * y + sum_j comb[j, k] * streams[j]: y [S, D] -> [S, H, D]."""
    x = streams.astype(mx.float32)
    out = post[..., None] * y.astype(mx.float32)[:, None]
    for j in range(streams.shape[1]):  # fixed order, and no transposed copy of the streams
        out = out + comb[:, j, :, None] * x[:, j, None]
    return out.astype(streams.dtype)
