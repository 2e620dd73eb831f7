"""Choosing a token from logits, on the device, without waiting for it.

Noise depends on (seed, position) only, so the same seed gives the same tokens however the steps
were batched, and a verified draft can be compared with the token that would have been drawn.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Protocol, cast

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ds4py.engine.options import SamplingOptions
from ds4py.errors import OptionsError

Logprobs = tuple[float, tuple[tuple[int, float], ...]]
"""(log-probability of the token, (id, log-probability) of the likeliest, likeliest first)."""

GOLDEN_GAMMA = 0x9E3779B97F4A7C15
"""Odd constant of the splitmix64 generator: spreads neighbouring positions over all keys."""


class Constraint(Protocol):
    """What one answer may consist of, told its tokens one by one."""

    def allowed(self) -> npt.NDArray[np.bool_] | None:
        """Which tokens may come next, [V], at least one; None: all."""
        ...

    def accept(self, token: int) -> None:
        """`token` came next."""
        ...


class Sampler:
    """One request's sampling state: options, seed, the tokens penalties look at, constraint.

    Raises OptionsError for a bias on a token the model lacks.
    """

    def __init__(
        self,
        options: SamplingOptions,
        prompt: Sequence[int],
        vocab_size: int,
        constraint: Constraint | None = None,
    ):
        self.options = options
        self._constraint = constraint
        self._last: mx.array | None = None  # the token the constraint was not told of yet
        self._bias = _bias(options, vocab_size) if options.logit_bias else None
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
        if self._bias is not None:
            logits = logits + self._bias
        if self._constraint is not None:
            logits = self._constrain(logits, self._constraint)
        if self.options.temperature == 0:
            token = mx.argmax(logits)
        else:
            scaled = restrict(logits / self.options.temperature, self.options)
            key = mx.random.key((self.seed + position * GOLDEN_GAMMA) % 2**64)
            token = mx.random.categorical(scaled, key=key)
        if self._penalised:
            self._counts = self._counts.at[token].add(1)
        self._last = token
        return token

    def _constrain(self, logits: mx.array, constraint: Constraint) -> mx.array:
        """Logits with what the constraint forbids at -inf. Waits for the token before this one."""
        if self._last is not None:
            constraint.accept(cast(int, self._last.item()))
        allowed = constraint.allowed()
        return logits if allowed is None else mx.where(mx.array(allowed), logits, -mx.inf)

    def _penalise(self, logits: mx.array) -> mx.array:
        o = self.options
        seen = mx.logical_or(self._in_prompt, self._counts > 0)
        r = o.repetition_penalty
        shrunk = mx.where(logits > 0, logits / r, logits * r)
        logits = mx.where(seen, shrunk, logits)
        present = (self._counts > 0).astype(mx.float32)
        return logits - o.presence_penalty * present - o.frequency_penalty * self._counts


def _bias(options: SamplingOptions, vocab_size: int) -> mx.array:
    bias = np.zeros(vocab_size, np.float32)
    for token, value in options.logit_bias:
        if token >= vocab_size:
            raise OptionsError(
                f"logit_bias names token {token}; need an id below the vocabulary's {vocab_size}"
            )
        bias[token] = value
    return mx.array(bias)


def logprobs(logits: mx.array, token: int, n: int) -> Logprobs:
    """Of `token` and of the n likeliest, from logits [V] as the model gave them."""
    values = np.array(logits - mx.logsumexp(logits))
    likeliest = np.argsort(-values, kind="stable")[:n]
    return float(values[token]), tuple((int(i), float(values[i])) for i in likeliest)


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
