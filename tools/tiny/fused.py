"""Token-wise functions, compiled while training (they are bound by memory, not by arithmetic).

Their shapes depend on the number of tokens of a forward pass only, so that one compilation serves
all sequence lengths.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .quant import fp4sim, fp8sim, ste
from .rope import rope_tail


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)  # type: ignore[no-any-return]


def pick(function: Callable[..., Any], on: bool) -> Callable[..., Any]:
    """The function, compiled if `on`."""
    return compiled(function) if on else function


def rms_norm(x: Tensor, w: Tensor | None, eps: float = 1e-6) -> Tensor:
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return y if w is None else y * w


def hyper_before(
    x: Tensor, m: Tensor, base: Tensor, scale: Tensor, norm: Tensor,
    iters: int, eps: float, norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """x [N, H, D], m = x fn^T -> normed input [N, D], post [N, H], comb [N, H, H]."""
    h = x.shape[1]
    m = m * torch.rsqrt(x.flatten(1).square().mean(-1, keepdim=True) + norm_eps)
    a, b, c = m.split((h, h, h * h), -1)
    pre = torch.sigmoid(a * scale[0] + base[:h]) + eps
    post = 2 * torch.sigmoid(b * scale[1] + base[h : 2 * h])
    comb = (c * scale[2] + base[2 * h :]).unflatten(-1, (h, h))
    comb = comb.softmax(-1) + eps
    comb = comb / (comb.sum(-2, keepdim=True) + eps)
    for _ in range(iters - 1):
        comb = comb / (comb.sum(-1, keepdim=True) + eps)
        comb = comb / (comb.sum(-2, keepdim=True) + eps)
    y = sum(pre[:, i, None] * x[:, i] for i in range(h))
    assert isinstance(y, Tensor)
    return rms_norm(y, norm, norm_eps), post, comb


def hyper_after(y: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """X'[k] = post[k] y + sum_j comb[j, k] X[j]."""
    h = x.shape[1]
    new = []
    for k in range(h):
        mixed = sum(comb[:, j, k, None] * x[:, j] for j in range(h))
        new.append(post[:, k, None] * y + mixed)
    return torch.stack(new, 1)


def swiglu(a: Tensor, limit: float) -> Tensor:
    gate, up = a.chunk(2, -1)
    return F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)


def weighted_swiglu(a: Tensor, wt: Tensor, limit: float) -> Tensor:
    return swiglu(a, limit) * wt[:, None]


def pool(u: Tensor, z: Tensor) -> Tensor:
    """Compressor pooling: [B, R, slots, d] -> [B, R, d], a softmax per channel."""
    return (z.softmax(2) * u).sum(2)


def query(q: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """[N, heads d] -> normed and rotated [N, heads, d]; cos, sin [N, rope/2]."""
    return rope_tail(rms_norm(q.unflatten(-1, (heads, -1)), None), cos[:, None], sin[:, None])


def key(kv: Tensor, norm: Tensor, cos: Tensor, sin: Tensor, rounding: bool) -> Tensor:
    """[N, d] -> normed, rotated and perhaps rounded [N, d]."""
    return round_row(rope_tail(rms_norm(kv, norm), cos, sin), 2 * cos.shape[-1], rounding)


def round_row(row: Tensor, n_rope: int, rounding: bool) -> Tensor:
    """The FP8 round trip of everything but the last `n_rope` channels."""
    if not rounding:
        return row
    plain = row[..., :-n_rope]
    return torch.cat((ste(plain, fp8sim(plain.detach())), row[..., -n_rope:]), -1)


def index_query(q: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """[N, heads d] -> rotated [N, heads, d]."""
    return rope_tail(q.unflatten(-1, (heads, -1)), cos[:, None], sin[:, None])


def round_index(x: Tensor) -> Tensor:
    return ste(x, fp4sim(x.detach()))


def output(o: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate back; o [N, heads, d]."""
    return rope_tail(o, cos[:, None], -sin[:, None])
