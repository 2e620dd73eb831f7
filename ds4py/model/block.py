"""One layer: attention and feed-forward, each between hyper-connections."""

from __future__ import annotations

from dataclasses import dataclass

from ds4py.cache.state import LayerDelta
from ds4py.config import ModelConfig
from ds4py.kernels import hyper
from ds4py.kernels.hyper import HyperWeights
from ds4py.kernels.norm import rms_norm
from ds4py.kernels.ops import Array, Ops
from ds4py.model.attention import Attention
from ds4py.model.moe import MoE
from ds4py.model.plan import StepPlan


@dataclass(frozen=True)
class Block:
    """`layers.N` of the checkpoint (or the block inside `mtp.N`)."""

    config: ModelConfig
    ops: Ops
    hc_attn: HyperWeights
    attn_norm: Array
    attn: Attention
    hc_ffn: HyperWeights
    ffn_norm: Array
    ffn: MoE

    def __call__(self, streams: Array, tokens: Array, plan: StepPlan) -> tuple[Array, LayerDelta]:
        """streams [S, H, D], tokens [S] -> streams [S, H, D] and the layer's delta."""
        ops, eps, iters = self.ops, self.config.rms_norm_eps, self.config.hc_sinkhorn_iters
        x, post, comb = hyper.mix(ops, streams, self.hc_attn, iters)
        y, delta = self.attn(rms_norm(ops, x, self.attn_norm, eps), plan)
        streams = hyper.expand(ops, y, streams, post, comb)
        x, post, comb = hyper.mix(ops, streams, self.hc_ffn, iters)
        y = self.ffn(rms_norm(ops, x, self.ffn_norm, eps), tokens)
        return hyper.expand(ops, y, streams, post, comb), delta
