"""The draft layer (MTP): from a position's streams and the next token, logits two tokens ahead.

Position p combines the main model's streams X_p (before the head) with token p+1 and predicts
token p+2. It has a window of its own and shares embedding and output head with the main model.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from ds4py.cache.rows import RowFormats
from ds4py.cache.state import Delta, SequenceState
from ds4py.config import LayerPlan, ModelConfig
from ds4py.kernels.hyper import HyperWeights
from ds4py.kernels.ops import Array, LinearMaps, Ops
from ds4py.model.block import Block
from ds4py.model.fused import Fused
from ds4py.model.plan import Frequencies, StepPlan, StepPlans


@dataclass(frozen=True)
class DraftLayer:
    """`mtp.0` of the checkpoint."""

    config: ModelConfig
    layer: LayerPlan
    fused: Fused
    rows: RowFormats
    freqs: Frequencies
    embed: Array
    e_proj: LinearMaps
    h_proj: LinearMaps
    enorm: Array
    hnorm: Array
    block: Block
    hc_head: HyperWeights
    norm: Array
    head: LinearMaps

    @property
    def ops(self) -> Ops:
        return self.fused.ops

    def new_state(self) -> SequenceState:
        """The empty draft sequence; its position p holds the pair (X_p, token p+1)."""
        return SequenceState(self.config, (self.layer,), self.rows, self.fused.stack)

    def step(
        self, streams: Array, next_tokens: Array, state: SequenceState
    ) -> tuple[mx.array, Delta]:
        """streams [S, H, D] of positions p.., next_tokens [S] at p+1.. -> float32 logits for
        p+2.. [S, V] and the delta, whose streams feed a further draft step."""
        n_tokens = next_tokens.shape[0]
        plan = StepPlan(self.ops, self.config, self.freqs, state, n_tokens)
        tokens = self.ops.array(next_tokens)
        z = self.fused.draft(self, streams, tokens)
        z, deltas = self.block(z, tokens, StepPlans([plan]), self.hc_head)
        self.block.ffn.experts.end(z.values)
        logits = self.fused.head(z, self.hc_head, self.norm, self.head)
        return logits, Delta(n_tokens, deltas, z.values)
