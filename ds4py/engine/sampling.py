"""Choosing a token from logits, on the device, without waiting for it.

Noise depends on (seed, position, token id) only, so the same seed gives the same tokens however the
steps were batched, and a verified draft can be compared with the token that would have been drawn.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, cast

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ds4py.engine.options import SamplingOptions
from ds4py.errors import OptionsError
from ds4py.kernels import sample
from ds4py.kernels.build import Launcher

Logprobs = tuple[float, tuple[tuple[int, float], ...]]
"""(log-probability of the token, (id, log-probability) of the likeliest, likeliest first)."""

ANY = mx.array([-np.inf], mx.float32)
"""No logit is too small to be drawn."""


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
        launcher: Launcher | None = None,
    ):
        """launcher: draws with the Metal kernel; None: with MLX's operations, the same tokens."""
        self.options = options
        self._constraint = constraint
        self._last: mx.array | None = None  # the token the constraint was not told of yet
        self._bias = _bias(options, vocab_size) if options.logit_bias else None
        self.seed = secrets.randbits(62) if options.seed is None else options.seed
        o = options
        log_min_p = float(np.log(o.min_p)) if o.min_p > 0 else -np.inf
        penalties = (o.repetition_penalty, o.presence_penalty, o.frequency_penalty)
        self._settings = mx.array([[o.temperature, log_min_p, *penalties]])
        self._drawn = mx.array([[1.0, log_min_p, 1.0, 0.0, 0.0]])  # of logits that are scaled
        self._bounds = mx.array([[float(o.top_k), o.top_p]])
        self._bound: Callable[..., Any] = sample.bound_ref
        self._draw: Callable[..., Any] = sample.token_ref
        if launcher is not None:
            self._bound = partial(sample.bound, launcher)
            self._draw = partial(sample.token, launcher)
        self._in_prompt = self._counts = None
        if penalties != (1, 0, 0):
            in_prompt = np.zeros((1, vocab_size), bool)
            in_prompt[0, list(prompt)] = True
            self._in_prompt, self._counts = mx.array(in_prompt), mx.zeros((1, vocab_size))

    def __call__(self, logits: mx.array, position: int) -> mx.array:
        """float32 logits [V] after `position` tokens -> the next token's id, a lazy scalar."""
        bias = self._bias if self._constraint is None else self._constrain(self._constraint)
        token = self._draw_from(logits, position, bias)
        if self._counts is not None:
            self._counts = self._counts.at[0, token].add(1)
        self._last = token.squeeze(0)
        return self._last

    def guess(self, logits: mx.array, position: int) -> mx.array:
        """What these logits would give there, constraint aside. Nothing is remembered."""
        return self._draw_from(logits, position, self._bias).squeeze(0)

    def _draw_from(self, logits: mx.array, position: int, bias: mx.array | None) -> mx.array:
        """[1]"""
        logits, o, seen = logits[None], self.options, (self._in_prompt, self._counts)
        key = mx.array(sample.noise_key(self.seed, position)[None])
        if o.temperature and (o.top_k or o.top_p < 1):
            scaled, lowest = self._bound(logits, self._settings, self._bounds, *seen, bias)
            return cast(mx.array, self._draw(scaled, self._drawn, key, lowest))
        greedy = o.temperature == 0
        token = self._draw(logits, self._settings, key, ANY, *seen, bias, greedy)
        return cast(mx.array, token)

    def _constrain(self, constraint: Constraint) -> mx.array | None:
        """The bias, with what the constraint forbids at -inf. Waits for the token before this
        one."""
        if self._last is not None:
            constraint.accept(cast(int, self._last.item()))
        allowed = constraint.allowed()
        if allowed is None:
            return self._bias
        forbidden = mx.array(np.where(allowed, 0, -np.inf).astype(np.float32)[None])
        return forbidden if self._bias is None else self._bias + forbidden


def _bias(options: SamplingOptions, vocab_size: int) -> mx.array:
    """[1, V]"""
    bias = np.zeros((1, vocab_size), np.float32)
    for token, value in options.logit_bias:
        if token >= vocab_size:
            raise OptionsError(
                f"logit_bias names token {token}; need an id below the vocabulary's {vocab_size}"
            )
        bias[0, token] = value
    return mx.array(bias)


def logprobs(logits: mx.array, token: int, n: int) -> Logprobs:
    """Of `token` and of the n likeliest, from logits [V] as the model gave them."""
    values = np.array(logits - mx.logsumexp(logits))
    likeliest = np.argsort(-values, kind="stable")[:n]
    return float(values[token]), tuple((int(i), float(values[i])) for i in likeliest)
