"""One layer: attention and feed-forward, each between hyper-connections."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from ds4py.cache.state import LayerDelta
from ds4py.kernels.hyper import expand
from ds4py.kernels.norm import rms_norm
from ds4py.model.attention import Attention
from ds4py.model.hyper import HyperConnection
from ds4py.model.moe import MoE
from ds4py.model.plan import StepPlan


@dataclass(frozen=True)
class Block:
    """`layers.N` of the checkpoint (or the block inside `mtp.N`)."""

    hc_attn: HyperConnection
    attn_norm: mx.array
    attn: Attention
    hc_ffn: HyperConnection
    ffn_norm: mx.array
    ffn: MoE
    eps: float

    def __call__(
        self, streams: mx.array, tokens: mx.array, plan: StepPlan
    ) -> tuple[mx.array, LayerDelta]:
        """streams [S, H, D], tokens [S] -> streams [S, H, D] and the layer's delta."""
        x, post, comb = self.hc_attn.mix(streams)
        y, delta = self.attn(rms_norm(x, self.attn_norm, self.eps), plan)
        streams = expand(y, streams, post, comb)
        x, post, comb = self.hc_ffn.mix(streams)
        y = self.ffn(rms_norm(x, self.ffn_norm, self.eps), tokens)
        return expand(y, streams, post, comb), delta
