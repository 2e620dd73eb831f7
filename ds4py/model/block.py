"""One layer: attention and feed-forward, each between hyper-connections."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from ds4py.cache.state import LayerDelta
from ds4py.config import ModelConfig
from ds4py.kernels import hyper
from ds4py.kernels.dense import Dense
from ds4py.kernels.hyper import HyperWeights
from ds4py.kernels.norm import rms_norm
from ds4py.model.attention import Attention
from ds4py.model.moe import MoE
from ds4py.model.plan import StepPlan


@dataclass(frozen=True)
class Block:
    """`layers.N` of the checkpoint (or the block inside `mtp.N`)."""

    config: ModelConfig
    dense: Dense
    hc_attn: HyperWeights
    attn_norm: mx.array
    attn: Attention
    hc_ffn: HyperWeights
    ffn_norm: mx.array
    ffn: MoE

    def __call__(
        self, streams: mx.array, tokens: mx.array, plan: StepPlan
    ) -> tuple[mx.array, LayerDelta]:
        """streams [S, H, D], tokens [S] -> streams [S, H, D] and the layer's delta."""
        eps, iters = self.config.rms_norm_eps, self.config.hc_sinkhorn_iters
        x, post, comb = hyper.mix(self.dense, streams, self.hc_attn, iters)
        y, delta = self.attn(rms_norm(x, self.attn_norm, eps), plan)
        streams = hyper.expand(y, streams, post, comb)
        x, post, comb = hyper.mix(self.dense, streams, self.hc_ffn, iters)
        y = self.ffn(rms_norm(x, self.ffn_norm, eps), tokens)
        return hyper.expand(y, streams, post, comb), delta
