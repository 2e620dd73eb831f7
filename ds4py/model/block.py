"""One layer: attention and feed-forward, each between hyper-connections."""

from __future__ import annotations

from dataclasses import dataclass

from ds4py.cache.state import LayerDelta
from ds4py.kernels.hyper import HyperWeights
from ds4py.kernels.ops import Array
from ds4py.model.attention import Attention
from ds4py.model.fused import Fused, Streams
from ds4py.model.moe import MoE
from ds4py.model.plan import StepPlans


@dataclass(frozen=True)
class Block:
    """`layers.N` of the checkpoint (or the block inside `mtp.N`)."""

    fused: Fused
    hc_attn: HyperWeights
    attn_norm: Array
    attn: Attention
    hc_ffn: HyperWeights
    ffn_norm: Array
    ffn: MoE

    def __call__(
        self, streams: Streams, tokens: Array, plans: StepPlans, reader: HyperWeights
    ) -> tuple[Streams, list[LayerDelta]]:
        """tokens [S] of all sequences -> the streams after the layer, for `reader`, and what the
        layer adds to each sequence."""
        x, residual = self.fused.enter(streams, self.hc_attn, self.attn_norm)
        attended, deltas = self.attn(x, plans)
        streams = self.fused.leave(attended, self.attn, residual, self.hc_ffn)
        self.ffn.experts.foresee(self.ffn.index, streams.values)
        x, residual = self.fused.enter(streams, self.hc_ffn, self.ffn_norm)
        return self.ffn(x, tokens, residual, reader), deltas
