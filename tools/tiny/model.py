"""DeepSeek V4 for training on a CPU: whole sequences, no cache (deepseek-v4.md section 3 and 5).

Parameters carry the checkpoint's names; the experts of a layer are stacked in one tensor. Large
products run in `mm` (bfloat16 while training), everything else in float32. Window attention works
on blocks of W queries against the W keys before and the W keys of the block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .fused import rms_norm
from .layers import Attention, HyperConnection, Mode, MoE, linear, weight


class Block(nn.Module):
    """Attention and MoE, each between hyper-connections."""

    def __init__(self, c: dict[str, Any], ratio: int, hashed: bool) -> None:
        super().__init__()
        self.attn_norm = nn.Parameter(torch.ones(c["hidden_size"]))
        self.ffn_norm = nn.Parameter(torch.ones(c["hidden_size"]))
        self.hc_attn = HyperConnection(c)
        self.hc_ffn = HyperConnection(c)
        self.attn = Attention(c, ratio)
        self.ffn = MoE(c, hashed)

    def forward(self, x: Tensor, ids: Tensor, mode: Mode) -> tuple[Tensor, Tensor | None]:
        """Streams [B, T, H, D] -> the same; second result: the indexer's loss."""
        y, post, comb = self.hc_attn.before(x, self.attn_norm, mode)
        y, index_loss = self.attn(y, mode)
        x = self.hc_attn.after(y, x, post, comb, mode)
        y, post, comb = self.hc_ffn.before(x, self.ffn_norm, mode)
        y = self.ffn(y, ids, mode)
        return self.hc_ffn.after(y, x, post, comb, mode), index_loss


class Head(nn.Module):
    """Collapse of the streams and the last norm; the vocabulary matrix is given."""

    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        h, d = c["hc_mult"], c["hidden_size"]
        self.hc_head_fn = nn.Parameter(torch.randn(h, h * d) * 0.01)
        self.hc_head_base = nn.Parameter(torch.full((h,), -1.1))
        self.hc_head_scale = nn.Parameter(torch.ones(1))
        self.norm = nn.Parameter(torch.ones(d))
        self.eps, self.hc_eps = c["rms_norm_eps"], c["hc_eps"]

    def forward(self, x: Tensor) -> Tensor:
        f = x.flatten(-2)
        m = (f @ self.hc_head_fn.T) * torch.rsqrt(f.square().mean(-1, keepdim=True) + self.eps)
        pre = torch.sigmoid(m * self.hc_head_scale + self.hc_head_base) + self.hc_eps
        return rms_norm((pre[..., None] * x).sum(-2), self.norm)


class MTP(nn.Module):
    """The layer that drafts token p+2 from the streams at p and token p+1."""

    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        d = c["hidden_size"]
        self.e_proj = weight(d, d)
        self.h_proj = weight(d, d)
        self.enorm = nn.Parameter(torch.ones(d))
        self.hnorm = nn.Parameter(torch.ones(d))
        self.block = Block(c, c["compress_ratios"][c["num_hidden_layers"]], hashed=False)
        self.head = Head(c)

    def forward(self, x: Tensor, next_embed: Tensor, ids: Tensor, mode: Mode) -> Tensor:
        e = linear(rms_norm(next_embed, self.enorm), self.e_proj, mode)
        h = linear(rms_norm(x, self.hnorm), self.h_proj, mode)
        z, _ = self.block(e[:, :, None] + h, ids, mode)
        return self.head(z)


@dataclass
class Output:
    """Hidden states before the vocabulary matrix, and auxiliary losses."""

    hidden: Tensor
    draft: Tensor | None
    index_loss: Tensor


class Model(nn.Module):
    """The main layers, the head and the MTP layer."""

    def __init__(self, c: dict[str, Any], draft: bool = True) -> None:
        super().__init__()
        self.c = c
        d, v, n = c["hidden_size"], c["vocab_size"], c["num_hidden_layers"]
        self.embed = nn.Parameter(torch.randn(v, d) * 0.5)
        self.head_weight = nn.Parameter(torch.randn(v, d) * 0.02)
        self.layers = nn.ModuleList(
            Block(c, c["compress_ratios"][i], i < c["num_hash_layers"]) for i in range(n)
        )
        self.layers[0].attn.first = True
        self.head = Head(c)
        self.mtp = MTP(c) if draft else None

    def forward(self, ids: Tensor, mode: Mode, draft: bool = True) -> Output:
        """ids [B, T] with T a multiple of the window."""
        embedded = F.embedding(ids, self.embed)
        x = embedded[:, :, None].expand(-1, -1, self.c["hc_mult"], -1)
        losses = []
        for layer in self.layers:
            x, loss = layer(x, ids, mode)
            if loss is not None:
                losses.append(loss)
        total = torch.stack(losses).mean() if losses else x.new_zeros(())
        drafted = None
        if draft and self.mtp is not None:
            following = torch.roll(embedded, -1, 1)
            drafted = self.mtp(x, following, ids, mode)
        return Output(self.head(x), drafted, total)

    def logits(self, hidden: Tensor, mode: Mode) -> Tensor:
        if mode.mm == torch.float32:
            return hidden @ self.head_weight.T
        return (hidden.to(mode.mm) @ self.head_weight.to(mode.mm).T).float()
