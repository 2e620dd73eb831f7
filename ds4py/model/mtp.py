"""The draft layer (MTP): from a position's streams and the next token, logits two tokens ahead.

Position p combines the main model's streams X_p (before the head) with token p+1 and predicts
token p+2. It has a window of its own and shares embedding and output head with the main model.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from ds4py.cache.state import Delta, SequenceState
from ds4py.config import LayerPlan, ModelConfig
from ds4py.kernels.hyper import HyperWeights, collapse_head
from ds4py.kernels.norm import rms_norm
from ds4py.kernels.ops import Array, Dtype, Ops, Weight
from ds4py.model.block import Block
from ds4py.model.plan import Frequencies, StepPlan


@dataclass(frozen=True)
class DraftLayer:
    """`mtp.0` of the checkpoint."""

    config: ModelConfig
    layer: LayerPlan
    ops: Ops
    dtype: Dtype
    freqs: Frequencies
    embed: Array
    e_proj: Weight
    h_proj: Weight
    enorm: Array
    hnorm: Array
    block: Block
    hc_head: HyperWeights
    norm: Array
    head: Weight

    def new_state(self) -> SequenceState:
        """The empty draft sequence; its position p holds the pair (X_p, token p+1)."""
        return SequenceState(self.ops, self.config, (self.layer,), self.dtype)

    def step(
        self, streams: Array, next_tokens: Array, state: SequenceState
    ) -> tuple[mx.array, Delta]:
        """streams [S, H, D] of positions p.., next_tokens [S] at p+1.. -> float32 logits for
        p+2.. [S, V] and the delta, whose streams feed a further draft step."""
        eps = self.config.rms_norm_eps
        plan = StepPlan(self.ops, self.config, self.freqs, state, next_tokens.shape[0])
        ops, tokens = self.ops, self.ops.array(next_tokens)
        e = ops.project(rms_norm(ops, self.embed[tokens], self.enorm, eps), self.e_proj)[0]
        h = ops.project(rms_norm(ops, streams, self.hnorm, eps), self.h_proj)[0]
        z, delta = self.block(e[:, None] + h, tokens, plan)
        x = rms_norm(ops, collapse_head(ops, z, self.hc_head), self.norm, eps)
        logits = ops.to_mlx(ops.project(x, self.head)[0])
        return logits, Delta(next_tokens.shape[0], [delta], z)
