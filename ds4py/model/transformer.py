"""The main model: embed, layers, head.

Shape letters used in this package: S new tokens, T tokens so far, D hidden, H streams (hc_mult),
hd head_dim, E routed experts, k experts per token, I expert width, V vocabulary, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from ds4py.cache.state import Delta, LayerDelta, SequenceState
from ds4py.config import ModelConfig
from ds4py.kernels.hyper import HyperWeights, collapse_head
from ds4py.kernels.norm import rms_norm
from ds4py.kernels.ops import Array, Dtype, Ops, Weight
from ds4py.model.block import Block
from ds4py.model.plan import Frequencies, StepPlan


@dataclass(frozen=True)
class Transformer:
    """DeepSeek V4. Stateless: the sequence is an argument of every step."""

    config: ModelConfig
    ops: Ops
    dtype: Dtype
    freqs: Frequencies
    embed: Array
    """[V, D]"""
    blocks: tuple[Block, ...]
    hc_head: HyperWeights
    norm: Array
    head: Weight

    def new_state(self) -> SequenceState:
        """The empty sequence."""
        return SequenceState(self.ops, self.config, self.config.layers, self.dtype)

    def step(
        self, tokens: Array, state: SequenceState, n_logits: int | None = None
    ) -> tuple[mx.array, Delta]:
        """tokens [S] after `state` -> float32 logits of the last `n_logits` positions (all by
        default) [n, V], and the delta. The state is not changed."""
        plan = StepPlan(self.ops, self.config, self.freqs, state, tokens.shape[0])
        tokens = self.ops.array(tokens)
        x = self.embed[tokens]  # [S, D]
        shape = (x.shape[0], self.config.hc_mult, x.shape[1])
        streams = self.ops.broadcast_to(x[:, None], shape)
        deltas: list[LayerDelta] = []
        for block in self.blocks:
            streams, delta = block(streams, tokens, plan)
            deltas.append(delta)
        n_logits = tokens.shape[0] if n_logits is None else n_logits
        n_logits = tokens.shape[0] if n_logits is None else n_logits
        if n_logits == 0:
            logits = mx.zeros((0, self.config.vocab_size))
        else:
            logits = self.logits(streams[tokens.shape[0] - n_logits :])
        return logits, Delta(tokens.shape[0], deltas, streams)

    def logits(self, streams: Array) -> mx.array:
        """streams [n, H, D] -> float32 [n, V]."""
        x = collapse_head(self.ops, streams, self.hc_head)
        x = rms_norm(self.ops, x, self.norm, self.config.rms_norm_eps)
        return self.ops.to_mlx(self.ops.project(x, self.head)[0])
