"""The layers of the training model: hyper-connections, attention, compressors, indexer, MoE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import fused
from .fused import hyper_after, hyper_before, pick, rms_norm, swiglu, weighted_swiglu
from .moe import GroupedLinear
from .quant import fp4_weight, fp8_weight, ste
from .rope import rope_tables, rope_tail


@dataclass
class Mode:
    """How a forward pass computes; the training schedule changes it."""

    mm: torch.dtype = torch.float32
    weight_rounding: bool = False
    """Weights as they will be stored (straight-through)."""
    row_rounding: bool = False
    """Round trips of key/value rows and index rows (straight-through)."""
    select: bool = False
    """Attend to the indexer's choice only, instead of all compressed rows."""
    index_loss: bool = False
    reach: int = 0
    """If set, layers with compressed rows see only so much of their window: then even near
    text must be found through the rows, which is how they learn to be found."""
    sources: Tensor | None = None
    """[B, 2, T]: where the number that is being recalled was stated, and where the name of a
    number stands, or -1; and the weight of looking there (see `source_loss`, `owner_loss`)."""
    source_weight: float = 0.0
    fused: bool = False
    """Token-wise parts compiled."""


def weight(out: int, inner: int, gain: float = 1.0) -> nn.Parameter:
    return nn.Parameter(torch.randn(out, inner) * gain * inner**-0.5)


def stored(w: Tensor, mode: Mode) -> Tensor:
    """An FP8 weight as the checkpoint will hold it."""
    if not mode.weight_rounding:
        return w
    return ste(w, pick(fp8_weight, mode.fused)(w.detach()))


def matmul(x: Tensor, w: Tensor, mode: Mode) -> Tensor:
    """x [..., in] by w [out, in]."""
    if mode.mm == torch.float32:
        return x @ w.T
    return (x.to(mode.mm) @ w.to(mode.mm).T).float()


def linear(x: Tensor, w: Tensor, mode: Mode) -> Tensor:
    return matmul(x, stored(w, mode), mode)


class HyperConnection(nn.Module):
    """Mixing of the residual streams around one sublayer (3.2)."""

    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        h, d = c["hc_mult"], c["hidden_size"]
        self.fn = nn.Parameter(torch.randn((2 + h) * h, h * d) * 0.01)
        base = torch.cat(
            (torch.randn(h) * 0.5 - 1.1, torch.randn(h) * 0.5, torch.eye(h).flatten() * 3)
        )
        self.base = nn.Parameter(base)
        self.scale = nn.Parameter(torch.ones(3))
        self.h, self.iters = h, c["hc_sinkhorn_iters"]
        self.eps, self.norm_eps = c["hc_eps"], c["rms_norm_eps"]

    def before(self, x: Tensor, norm: Tensor, mode: Mode) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, H, D] -> normed input [B, T, D], post [N, H], comb [N, H, H]; N = B T."""
        tokens = x.flatten(0, 1)
        m = matmul(tokens.flatten(1), self.fn, mode)
        before = pick(hyper_before, mode.fused)
        more = (self.base, self.scale, norm, self.iters, self.eps, self.norm_eps)
        y, post, comb = before(tokens, m, *more)
        return y.view(*x.shape[:2], -1), post, comb

    def after(self, y: Tensor, x: Tensor, post: Tensor, comb: Tensor, mode: Mode) -> Tensor:
        """New streams [B, T, H, D]."""
        after = pick(hyper_after, mode.fused)
        return after(y.flatten(0, 1), x.flatten(0, 1), post, comb).view(x.shape)


class Compressor(nn.Module):
    """Pools `ratio` tokens into one row (3.5); ratio 4 overlaps with the row before."""

    def __init__(self, c: dict[str, Any], ratio: int, dim: int) -> None:
        super().__init__()
        self.ratio, self.dim, self.overlap = ratio, dim, ratio == 4
        width = dim * (2 if self.overlap else 1)
        self.wkv = weight(width, c["hidden_size"])
        self.wgate = weight(width, c["hidden_size"])
        self.ape = nn.Parameter(torch.randn(ratio, width) * 0.5)
        self.norm = nn.Parameter(torch.ones(dim))

    @torch.no_grad()
    def start_as(self, wkv: Tensor) -> None:
        """Begin with the window's projection, so that what finds a token finds its row; and with
        a preference for a row's own tokens over those of the row before."""
        self.wkv.copy_(torch.cat([wkv] * (2 if self.overlap else 1)))
        if self.overlap:
            self.ape.mul_(2.0)
            self.ape[:, : self.dim] -= 1.0

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mode: Mode) -> Tensor:
        """x [B, T, D] -> rows [B, T // ratio, dim], rotated to their first token."""
        r = self.ratio
        n = x.shape[1] // r
        x = x[:, : n * r]
        u = matmul(x, self.wkv, mode).unflatten(1, (n, r))
        z = matmul(x, self.wgate, mode).unflatten(1, (n, r)) + self.ape
        if self.overlap:
            u, z = _overlap(u, self.dim, 0.0), _overlap(z, self.dim, -1e30)
        row = fused.pool(u, z)
        first = slice(0, n * r, r)
        return rope_tail(rms_norm(row, self.norm), cos[first], sin[first])


def _overlap(t: Tensor, dim: int, empty: float) -> Tensor:
    """[B, R, 4, 2 dim] -> [B, R, 8, dim]: the a half of the row before, then the own b half."""
    a = F.pad(t[..., :dim], (0, 0, 0, 0, 1, 0), value=empty)[:, :-1]
    return torch.cat((a, t[..., dim:]), 2)


class Indexer(nn.Module):
    """Scores compressed rows for selection (3.6)."""

    def __init__(self, c: dict[str, Any], ratio: int) -> None:
        super().__init__()
        self.heads, self.dim = c["index_n_heads"], c["index_head_dim"]
        self.wq_b = weight(self.heads * self.dim, c["q_lora_rank"])
        self.weights_proj = weight(self.heads, c["hidden_size"])
        self.compressor = Compressor(c, ratio, self.dim)
        n = torch.arange(self.dim)
        bits = sum(((n[:, None] & n[None]) >> k) & 1 for k in range(self.dim.bit_length()))
        hadamard = (1 - 2 * (bits % 2)).float() * self.dim**-0.5
        self.register_buffer("hadamard", hadamard, persistent=False)

    def forward(self, x: Tensor, qr: Tensor, cos: Tensor, sin: Tensor, mode: Mode) -> Tensor:
        """Scores [B, T, R], not masked."""
        q = linear(qr, self.wq_b, mode).flatten(0, 1)
        q = pick(fused.index_query, mode.fused)(q, *_per_token(cos, sin, len(x)), self.heads)
        k = self.compressor(x, cos, sin, mode)
        if mode.row_rounding:
            q = pick(fused.round_index, mode.fused)(q @ self.hadamard)
            k = fused.round_index(k @ self.hadamard)
        q = q.unflatten(0, x.shape[:2])
        w = matmul(x, self.weights_proj, mode) * (self.dim * self.heads) ** -0.5
        score = torch.einsum("bthd,brd->bthr", q.to(mode.mm), k.to(mode.mm)).float()
        return (score.relu() * w[..., None]).sum(2)


class Attention(nn.Module):
    """Shared-key attention over a window and compressed rows (3.4)."""

    def __init__(self, c: dict[str, Any], ratio: int) -> None:
        super().__init__()
        self.c, self.ratio = c, ratio
        self.first = False
        """The model's first layer, whose first head is taught to look at a number's owner."""
        self.heads, self.dim, self.window = (
            c["num_attention_heads"],
            c["head_dim"],
            c["sliding_window"],
        )
        self.groups, d, q = c["o_groups"], c["hidden_size"], c["q_lora_rank"]
        self.wq_a = weight(q, d)
        self.q_norm = nn.Parameter(torch.ones(q))
        self.wq_b = weight(self.heads * self.dim, q)
        self.wkv = weight(self.dim, d)
        self.kv_norm = nn.Parameter(torch.ones(self.dim))
        self.attn_sink = nn.Parameter(torch.zeros(self.heads))
        inner = self.heads * self.dim // self.groups
        self.wo_a = weight(self.groups * c["o_lora_rank"], inner)
        self.wo_b = weight(d, self.groups * c["o_lora_rank"], 0.5)
        self.compressor = Compressor(c, ratio, self.dim) if ratio else None
        self.indexer = Indexer(c, ratio) if ratio == 4 else None
        if self.compressor is not None:
            self.compressor.start_as(self.wkv)
        self.tables: dict[int, tuple[Tensor, Tensor]] = {}

    def forward(self, x: Tensor, mode: Mode) -> tuple[Tensor, Tensor | None]:
        """x [B, T, D] -> y [B, T, D] and the indexer's loss."""
        length = x.shape[1]
        if length not in self.tables:
            self.tables[length] = rope_tables(self.c, self.ratio, length)
        cos, sin = self.tables[length]
        qr = rms_norm(linear(x, self.wq_a, mode), self.q_norm)
        q, tables = linear(qr, self.wq_b, mode).flatten(0, 1), _per_token(cos, sin, len(x))
        q = pick(fused.query, mode.fused)(q, *tables, self.heads).unflatten(0, x.shape[:2])
        kv = linear(x, self.wkv, mode).flatten(0, 1)
        kv = pick(fused.key, mode.fused)(kv, self.kv_norm, *tables, mode.row_rounding)
        kv = kv.unflatten(0, x.shape[:2])
        rows = bias = scores = None
        if self.compressor is not None:
            rows = self.compressor(x, cos, sin, mode)
            rows = fused.round_row(rows, self.c["qk_rope_head_dim"], mode.row_rounding)
            bias = _visible(length, rows.shape[1], self.ratio)
        if self.indexer is not None and (mode.select or mode.index_loss):
            scores = self.indexer(x.detach(), qr.detach(), cos, sin, mode)
        o, loss = self.attend(q, kv, rows, bias, scores, mode)
        o = pick(fused.output, mode.fused)(o.flatten(0, 1), *tables).unflatten(0, x.shape[:2])
        o = o.unflatten(2, (self.groups, -1)).flatten(3)
        w = stored(self.wo_a, mode).unflatten(0, (self.groups, -1))
        t = torch.einsum("btgi,goi->btgo", o.to(mode.mm), w.to(mode.mm)).float()
        return linear(t.flatten(2), self.wo_b, mode), loss

    def attend(
        self,
        q: Tensor,
        kv: Tensor,
        rows: Tensor | None,
        bias: Tensor | None,
        scores: Tensor | None,
        mode: Mode,
    ) -> tuple[Tensor, Tensor | None]:
        """q [B, T, H, d], kv [B, T, d], rows [B, R, d], bias [T, R] -> o [B, T, H, d]."""
        batch, length, heads, dim = q.shape
        w, blocks = self.window, length // self.window
        q = (q * dim**-0.5).to(mode.mm)
        padded = F.pad(kv, (0, 0, w, 0)).to(mode.mm)
        keys = padded.unfold(1, 2 * w, w).transpose(2, 3).reshape(batch * blocks, 2 * w, dim)
        near = (q.reshape(batch * blocks, w * heads, dim) @ keys.transpose(1, 2)).float()
        reach = w if rows is None else mode.reach or w
        near = near.view(batch, blocks, w, heads, 2 * w) + _band(w, blocks, reach)
        near = near.view(batch, length, heads, 2 * w)
        parts, loss = [near], None
        if rows is not None and bias is not None:
            rows = rows.to(mode.mm)
            far = (q.reshape(batch, length * heads, dim) @ rows.transpose(1, 2)).float()
            far = far.view(batch, length, heads, -1) + bias[:, None]
            if scores is not None and mode.index_loss:
                loss = index_loss(near.detach(), far.detach(), self.attn_sink, scores + bias)
            if scores is not None and mode.select:
                far = far + choice(scores.detach() + bias, self.c["index_topk"])[:, :, None]
            parts.append(far)
        sink = self.attn_sink[:, None].expand(batch, length, heads, 1)
        p = torch.cat((*parts, sink), -1).softmax(-1)
        if self.ratio == 4 and mode.sources is not None:
            found = source_loss(p[..., 2 * w : -1], mode.sources[:, 0]) * mode.source_weight
            loss = found if loss is None else loss + found
        if self.first and mode.sources is not None:
            loss = owner_loss(p[:, :, 0, : 2 * w], mode.sources[:, 1], w) * mode.source_weight
        p = p.to(mode.mm)
        o = p[..., : 2 * w].reshape(batch * blocks, w * heads, 2 * w) @ keys
        o = o.view(batch, length, heads, dim)
        if rows is not None:
            inner = p[..., 2 * w : -1].reshape(batch, length * heads, -1)
            o = o + (inner @ rows).view(batch, length, heads, dim)
        return o.float(), loss


def _per_token(cos: Tensor, sin: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """Tables [T, n] -> [batch T, n]."""
    return cos.repeat(batch, 1), sin.repeat(batch, 1)


def _visible(length: int, n_rows: int, ratio: int) -> Tensor:
    """0 where row j is complete at position p, else -1e30. [T, R]"""
    limit = (torch.arange(length) + 1) // ratio
    hidden = torch.arange(n_rows)[None] >= limit[:, None]
    return hidden.float() * -1e30


def _band(w: int, blocks: int, reach: int) -> Tensor:
    """0 where a key of (block before, own block) is within reach. [blocks, w, 1, 2w]"""
    key, query = torch.arange(2 * w)[None], torch.arange(w)[:, None] + w
    inside = (key <= query) & (key > query - reach)
    mask = inside.expand(blocks, w, 2 * w).clone()
    mask[0, :, :w] = False
    return (~mask).float()[:, :, None] * -1e30


def choice(scores: Tensor, k: int) -> Tensor:
    """0 for the best k rows of each query, else -1e30; scores [B, T, R] already masked."""
    if scores.shape[-1] <= k:
        return torch.zeros_like(scores)
    hidden = torch.full_like(scores, -1e30)
    return hidden.scatter_(-1, scores.topk(k, -1).indices, 0.0)


def index_loss(near: Tensor, far: Tensor, sink: Tensor, scores: Tensor) -> Tensor:
    """KL from the head-summed attention over rows to softmax(scores), weighted by its mass."""
    with torch.no_grad():
        expanded = sink[:, None].expand(*far.shape[:-1], 1)
        total = torch.cat((near, far, expanded), -1).logsumexp(-1, keepdim=True)
        mass = (far - total).exp().sum(2)
        seen = mass.sum(-1, keepdim=True)
        target = mass / seen.clamp_min(1e-9)
    kl = (target * (target.clamp_min(1e-9).log() - scores.log_softmax(-1))).sum(-1)
    weight = seen[..., 0] / far.shape[2]
    return (kl * weight).sum() / weight.sum().clamp_min(1e-6)


def source_loss(p: Tensor, sources: Tensor) -> Tensor:
    """How little the first half of the heads looks at the rows that hold a recalled number.

    p [B, T, H, R]: attention over rows; sources [B, T]: a token position, or -1. A token's row
    and the row after it both pool the token. Guides the search for a needle that the loss of the
    next token alone finds only after many more examples.
    """
    batch, at = (sources >= 0).nonzero(as_tuple=True)
    if len(batch) == 0:
        return p.new_zeros(())
    row = (sources[batch, at] // 4)[:, None, None].expand(-1, p.shape[2] // 2, 1)
    mine = p[batch, at, : p.shape[2] // 2]
    mass = mine.gather(-1, row) + mine.gather(-1, (row + 1).clamp_max(p.shape[-1] - 1))
    return -(mass[..., 0] + 1e-4).log().mean()


def owner_loss(p: Tensor, owners: Tensor, w: int) -> Tensor:
    """How little one head, at the digits of a fact, looks at the name they belong to.

    p [B, T, 2w]: its attention over (block before, own block); owners [B, T]: a position, or -1.
    """
    batch, at = (owners >= 0).nonzero(as_tuple=True)
    if len(batch) == 0:
        return p.new_zeros(())
    key = owners[batch, at] - (at // w - 1) * w
    return -(p[batch, at].gather(-1, key[:, None]) + 1e-4).log().mean()


class MoE(nn.Module):
    """Hash- or score-routed experts and one shared expert (3.9)."""

    def __init__(self, c: dict[str, Any], hashed: bool) -> None:
        super().__init__()
        d, i, e = c["hidden_size"], c["moe_intermediate_size"], c["n_routed_experts"]
        self.k, self.limit = c["num_experts_per_tok"], c["swiglu_limit"]
        self.factor = c["routed_scaling_factor"]
        self.gate = weight(e, d)
        if hashed:
            table = torch.stack([torch.randperm(e)[: self.k] for _ in range(c["vocab_size"])])
            self.register_buffer("tid2eid", table)
        else:
            self.register_buffer("bias", torch.zeros(e))
        self.hashed = hashed
        self.w1 = nn.Parameter(torch.randn(e, i, d) * d**-0.5)
        self.w3 = nn.Parameter(torch.randn(e, i, d) * d**-0.5)
        self.w2 = nn.Parameter(torch.randn(e, d, i) * 0.5 * i**-0.5)
        self.shared_w1, self.shared_w3 = weight(i, d), weight(i, d)
        self.shared_w2 = weight(d, i, 0.5)
        self.counts = torch.zeros(e)
        """Tokens per expert since the bias was last updated."""

    def forward(self, x: Tensor, ids: Tensor, mode: Mode) -> Tensor:
        shape = x.shape
        x, ids = x.flatten(0, 1), ids.flatten()
        score = F.softplus(x @ self.gate.T).sqrt()
        index = self.tid2eid[ids] if self.hashed else (score + self.bias).topk(self.k, -1).indices
        chosen = score.gather(1, index)
        wt = chosen / chosen.sum(-1, keepdim=True) * self.factor
        y = self.routed(x, index, wt, mode)
        w13 = torch.cat((stored(self.shared_w1, mode), stored(self.shared_w3, mode)))
        h = pick(swiglu, mode.fused)(matmul(x, w13, mode), self.limit)
        y = y + linear(h, self.shared_w2, mode)
        return y.view(shape)

    def routed(self, x: Tensor, index: Tensor, wt: Tensor, mode: Mode) -> Tensor:
        order = index.flatten().argsort(stable=True)
        counts = torch.bincount(index.flatten(), minlength=len(self.w1))
        if self.training:
            self.counts += counts
        sizes = counts.tolist()
        w13, w2 = torch.cat((self.w1, self.w3), 1), self.w2
        if mode.weight_rounding:
            rounded = pick(fp4_weight, mode.fused)
            w13, w2 = ste(w13, rounded(w13.detach())), ste(w2, rounded(w2.detach()))
        token = order // self.k
        a = GroupedLinear.apply(x[token], w13, sizes, mode.mm)
        h = pick(weighted_swiglu, mode.fused)(a, wt.flatten()[order], self.limit)
        return torch.zeros_like(x).index_add(0, token, GroupedLinear.apply(h, w2, sizes, mode.mm))
