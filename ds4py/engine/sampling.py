"""Choosing a token from logits, on the device, without waiting for it.

Noise depends on (seed, position) only, so the same seed gives the same tokens however the steps
were batched, and a verified draft can be compared with the token that would have been drawn.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from ds4py.engine.options import SamplingOptions

GOLDEN_GAMMA = 0x9E3779B97F4A7C15
"""Odd constant of the splitmix64 generator: spreads neighbouring positions over all keys."""


class Sampler:
    """One request's sampling state: options, seed, and the tokens that penalties look at."""

    def __init__(self, options: SamplingOptions, prompt: Sequence[int], vocab_size: int):
        self.options = options
        self.seed = secrets.randbits(62) if options.seed is None else options.seed
        self._penalised = (
            options.repetition_penalty != 1 or options.presence_penalty or options.frequency_penalty
        )
        if self._penalised:
            in_prompt = np.zeros(vocab_size, bool)
            in_prompt[list(prompt)] = True
            self._in_prompt = mx.array(in_prompt)
            self._counts = mx.zeros(vocab_size)

    def __call__(self, logits: mx.array, position: int) -> mx.array:
        """float32 logits [V] after `position` tokens -> the next token's id, a lazy scalar."""
        if self._penalised:
            logits = self._penalise(logits)
        if self.options.temperature == 0:
            token = mx.argmax(logits)
        else:
            scaled = restrict(logits / self.options.temperature, self.options)
            key = mx.random.key((self.seed + position * GOLDEN_GAMMA) % 2**64)
            token = mx.random.categorical(scaled, key=key)
        if self._penalised:
            self._counts = self._counts.at[token].add(1)
        return token

    def _penalise(self, logits: mx.array) -> mx.array:
        o = self.options
        seen = mx.logical_or(self._in_prompt, self._counts > 0)
        r = o.repetition_penalty
        shrunk = mx.where(logits > 0, logits / r, logits * r)
        logits = mx.where(seen, shrunk, logits)
        present = (self._counts > 0).astype(mx.float32)
        return logits - o.presence_penalty * present - o.frequency_penalty * self._counts


def restrict(logits: mx.array, options: SamplingOptions) -> mx.array:
    """Logits [V] with everything outside top-k, top-p and min-p at -inf, in that order.

    The most likely token always stays. Ties at a boundary stay together.
    """
    if 0 < options.top_k < logits.shape[0]:
        kth = mx.sort(logits)[-options.top_k]
        logits = mx.where(logits < kth, -mx.inf, logits)
    if options.top_p < 1:
        ordered = mx.sort(logits)[::-1]
        p = mx.softmax(ordered, precise=True)
        kept = mx.cumsum(p) - p < options.top_p  # what comes before is short of top_p
        lowest = mx.min(mx.where(kept, ordered, mx.inf))
        logits = mx.where(logits < lowest, -mx.inf, logits)
    if options.min_p > 0:
        floor = mx.max(logits) + float(np.log(options.min_p))
        logits = mx.where(logits < floor, -mx.inf, logits)
    return logits
