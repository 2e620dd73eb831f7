"""Hyper-connections: four residual streams, mixed before and after every sublayer.

Shapes: S tokens, H = hc_mult streams, D hidden. All in float32 (bf16 mixing loses two digits).
"""

from __future__ import annotations

from dataclasses import dataclass

from ds4py.kernels.ops import Array, Ops, Weight


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
    c = c / c.sum(-1, keepdims=True) + eps
    c = c / (c.sum(-2, keepdims=True) + eps)
    for _ in range(iters - 1):
        c = c / (c.sum(-1, keepdims=True) + eps)
        c = c / (c.sum(-2, keepdims=True) + eps)
    return c


def expand(ops: Ops, y: Array, streams: Array, post: Array, comb: Array) -> Array:
    """out[k] = post[k] * y + sum_j comb[j, k] * streams[j]: y [S, D] -> [S, H, D]."""
    carried = comb.swapaxes(1, 2) @ streams.astype(ops.wide)
    return (post[..., None] * y.astype(ops.wide)[:, None] + carried).astype(streams.dtype)


def collapse_head(ops: Ops, streams: Array, w: HyperWeights) -> Array:
    """The collapse before the output norm, without Sinkhorn: [S, H, D] -> [S, D]."""
    return _collapse(ops, streams, ops.sigmoid(_project(ops, streams, w)) + w.eps)


def _project(ops: Ops, streams: Array, w: HyperWeights) -> Array:
    """Flattened streams through fn, over their root mean square, scaled and based: [S, rows]."""
    flat = streams.reshape(streams.shape[0], -1).astype(ops.wide)
    rms = ops.sqrt((flat * flat).mean(-1, keepdims=True) + w.norm_eps)
    return ops.project(flat, w.fn)[0] / rms * w.scale + w.base


def _collapse(ops: Ops, streams: Array, pre: Array) -> Array:
    """sum_h pre[h] * streams[h]: [S, D] in the streams' dtype."""
    x = streams.astype(ops.wide)
    return (pre[:, None] @ x)[:, 0].astype(streams.dtype)
