"""The main model: embed, layers, head.

Shape letters used in this package: S new tokens, T tokens so far, D hidden, H streams (hc_mult),
hd head_dim, E routed experts, k experts per token, I expert width, V vocabulary, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from ds4py.cache.rows import RowFormats
from ds4py.cache.state import Delta, LayerDelta, SequenceState
from ds4py.config import ModelConfig
from ds4py.kernels.hyper import HyperWeights
from ds4py.kernels.ops import Array, Dtype, LinearMaps, Ops
from ds4py.model.block import Block
from ds4py.model.fused import Fused, Streams
from ds4py.model.moe import ExpertSource
from ds4py.model.mtp import DraftLayer
from ds4py.model.plan import Frequencies, StepPlan, StepPlans


@dataclass(frozen=True)
class Transformer:
    """DeepSeek V4. Stateless: the sequence is an argument of every step."""

    config: ModelConfig
    fused: Fused
    dtype: Dtype
    rows: RowFormats
    freqs: Frequencies
    embed: Array
    """[V, D]"""
    blocks: tuple[Block, ...]
    hc_head: HyperWeights
    norm: Array
    head: LinearMaps
    experts: ExpertSource
    draft: DraftLayer | None = None
    """Whose window runs along in every state; None: nobody drafts."""

    @property
    def ops(self) -> Ops:
        return self.fused.ops

    def new_state(self) -> SequenceState:
        """The empty sequence."""
        drafts = () if self.draft is None else (self.draft.layer,)
        plans = (*self.config.layers, *drafts)
        return SequenceState(self.config, plans, self.rows, self.fused.stack)

    def step(
        self,
        tokens: Array,
        state: SequenceState,
        n_logits: int | None = None,
        cuts: Sequence[int] | None = None,
    ) -> tuple[mx.array, Delta]:
        """tokens [S] after `state` -> float32 logits of the last `n_logits` positions (all by
        default) [n, V], and the delta. The state is not changed. cuts: how many positions of the
        delta will be taken, ascending up to S; None: any number."""
        logits, (delta,) = self.step_together(tokens, [(state, tokens.shape[0])], n_logits, cuts)
        return logits, delta

    def step_together(
        self,
        tokens: Array,
        sequences: Sequence[tuple[SequenceState, int]],
        n_logits: int | None = None,
        cuts: Sequence[int] | None = None,
    ) -> tuple[mx.array, list[Delta]]:
        """One step of several sequences, which share every read of weights.

        tokens [S]: the new ones of all sequences, one sequence after the other; sequences: each
        state and how many of the tokens are its own. -> logits as `step`, and a delta for each.
        A row is computed as it would be alone.
        """
        plans = StepPlans(
            [StepPlan(self.ops, self.config, self.freqs, *sequence) for sequence in sequences]
        )
        n_tokens = tokens.shape[0]
        tokens = self.ops.array(tokens)
        self.experts.begin(tokens, last=n_logits != 0)
        readers = [*(block.hc_attn for block in self.blocks), self.hc_head]
        streams = self.fused.embed(self.embed, tokens, self.config.hc_mult, readers[0])
        added: list[list[LayerDelta]] = []
        for block, reader in zip(self.blocks, readers[1:], strict=True):
            streams, deltas = block(streams, tokens, plans, reader)
            added.append(deltas)
        if self.draft is not None and cuts is not None:
            added.append(self.draft.needed_rows(streams.values, tokens, plans.each[0], cuts))
        elif self.draft is not None:
            added.append(self.draft.rows(streams.values, tokens, plans))
        self.experts.end(streams.values)
        logits = self._logits(streams, n_tokens if n_logits is None else n_logits)
        made = zip(sequences, zip(*added, strict=True), plans.rows, strict=True)
        return logits, [
            Delta(state.position, n, list(layers), streams.values[at])
            for (state, n), layers, at in made
        ]

    def logits(self, streams: Array) -> mx.array:
        """Float32 logits [n, V] of streams [n, H, D] that a step left: those it gave, or would
        have."""
        return self._logits(Streams(streams), streams.shape[0])

    def _logits(self, streams: Streams, n: int) -> mx.array:
        """Float32 logits of the last n positions, [n, V]."""
        if n == 0:
            return mx.zeros((0, self.config.vocab_size))
        return self.fused.head(streams.last(n), self.hc_head, self.norm, self.head)
