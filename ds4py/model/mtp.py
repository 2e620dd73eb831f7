"""The draft layer (MTP): from a position's streams and the next token, logits two tokens ahead.

Position p combines the main model's streams X_p (before the head) with token p+1 and predicts
token p+2. The layer shares embedding and output head with the main model and has a window of its
own, which lies behind the main layers' in the same state, one position behind them: what a session
keeps, drops or goes back to, it does with both at once. A window row depends on its pair (X_p,
token p+1) alone, so the main model's step makes the rows, without attention and experts; only a
draft needs the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from ds4py.cache.state import LayerDelta, SequenceState
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

    def rows(self, streams: Array, tokens: Array, plans: StepPlans) -> list[LayerDelta]:
        """What a step over tokens [S] that left streams [S, H, D] adds to each sequence's window.

        Its first pair has the streams of the token before, which the state keeps. Before the first
        token there are none: the row for position -1 is seen by nobody.
        """
        pairs = [
            part
            for plan, at in zip(plans.each, plans.rows, strict=True)
            for part in (plan.state.frontier.streams, streams[at.start : at.stop - 1])
        ]
        behind = [self._plan(plan.state, plan.n_tokens, plan.start - 1) for plan in plans.each]
        return self._rows(self.ops.concatenate(pairs), tokens, StepPlans(behind))

    def needed_rows(
        self, streams: Array, tokens: Array, plan: StepPlan, cuts: Sequence[int]
    ) -> list[LayerDelta]:
        """The same for one sequence, whose state is taken after `cuts` of the tokens only: rows
        that no window will hold are zeros. Of a long prompt that is most of them."""
        ops, end = self.ops, 0
        pairs = ops.concatenate([plan.state.frontier.streams, streams[: plan.n_tokens - 1]])
        window: list[Array] = []
        read: list[Array] = []
        for cut in cuts:
            begin = max(end, cut - (self.config.sliding_window - 1))
            behind = self._plan(plan.state, cut - begin, plan.start - 1 + begin)
            (made,) = self._rows(pairs[begin:cut], tokens[begin:cut], StepPlans([behind]))
            for rows, new in ((window, made.window), (read, made.read)):
                if new is not None:
                    rows += [ops.zeros((begin - end, new.shape[1]), new.dtype), new]
            end = cut
        return [LayerDelta(ops.concatenate(window), ops.concatenate(read) if read else None)]

    def _rows(self, pairs: Array, tokens: Array, plans: StepPlans) -> list[LayerDelta]:
        z = self.fused.draft(self, pairs, tokens)
        x, _ = self.fused.enter(z, self.block.hc_attn, self.block.attn_norm)
        return self.fused.rows(x, self.block.attn, plans)

    def logits(self, streams: Array, next_tokens: Array, state: SequenceState) -> mx.array:
        """Pairs of the positions after those in the state's window: streams [S, H, D] of p.. and
        next_tokens [S] at p+1.. -> float32 logits for p+2.. [S, V]."""
        tokens = self.ops.array(next_tokens)
        plan = self._plan(state, tokens.shape[0], max(state.position - 1, 0))
        z = self.fused.draft(self, streams, tokens)
        z, _ = self.block(z, tokens, StepPlans([plan]), self.hc_head)
        self.block.ffn.experts.end(z.values)
        return self.fused.head(z, self.hc_head, self.norm, self.head)

    def _plan(self, state: SequenceState, n_tokens: int, start: int) -> StepPlan:
        return StepPlan(self.ops, self.config, self.freqs, state, n_tokens, start)
