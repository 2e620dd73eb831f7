"""The decode loop: all the work of one token, in the order it happens."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple, cast

import mlx.core as mx

from ds4py.cache.state import Delta, Frontier, SequenceState
from ds4py.engine.sampling import Sampler
from ds4py.engine.speculative import Speculation
from ds4py.model.transformer import Transformer

TOGETHER = 8
"""Most sequences in one step: what the decode kernels read weights once for."""


class Decoder:
    """Decodes any number of sequences of one model; those that wait for a token share a step. A
    sequence that has a step for itself may make two tokens in it (`speculative`)."""

    def __init__(self, model: Transformer, speculation: Speculation | None = None):
        self._model = model
        self._streams: list[_Stream] = []
        self.speculation = speculation or Speculation(model)

    def stream(
        self, state: SequenceState, logits: mx.array, sampler: Sampler, n_tokens: int
    ) -> Iterator[tuple[int, mx.array]]:
        """Yield up to `n_tokens` (token id, logits after it); each is in the state when it is
        yielded, and nothing else is in a state whose stream was closed.

        logits [1, V]: those after the state's last token. The step after a token is launched before
        the token is handed out, so that a GPU works while the caller prints.
        """
        stream = _Stream(state, sampler, logits)
        self._streams.append(stream)
        self.speculation.begin()
        try:
            for n_left in range(n_tokens, 0, -1):
                with self.speculation.timed():
                    if not self._has_token(stream):
                        if stream.failed is not None:
                            raise stream.failed
                        self._step(stream, n_left)
                    made, logits = stream.take()
                    # waits for the step before, not for the one just launched
                    token = cast(int, made.item())
                yield token, logits
        finally:
            self._streams.remove(stream)
            stream.step_back()
            self.speculation.end()

    def _has_token(self, stream: _Stream) -> bool:
        """Whether there is one to hand out without another step."""
        if stream.ahead is None and stream.guessed_right():
            self.speculation.confirmed()
        return stream.ahead is not None

    def _step(self, first: _Stream, n_left: int) -> None:
        """One step for `first` and for others that were handed all they have."""
        others = (s for s in self._streams if s is not first)
        waiting = (s for s in others if not self._has_token(s) and not s.failed)
        streams = [first, *islice(waiting, TOGETHER - 1)]
        tokens, guess = [stream.token for stream in streams], None
        if len(streams) > 1:
            self.speculation.end()
        else:
            guess = self.speculation.guess(first.state, first.token, first.sampler, n_left)
            tokens += [] if guess is None else [guess]
        n_each = len(tokens) // len(streams)
        sequences = [(stream.state, n_each) for stream in streams]
        logits, deltas = self._model.step_together(mx.stack(tokens), sequences)
        for i, (stream, delta) in enumerate(zip(streams, deltas, strict=True)):
            stream.advance(delta, logits[i : i + 1])
        if guess is not None:
            first.guess = _Guess(guess, first.state.frontier, deltas[0], logits[1:])
        pending = [array for stream in streams for array in stream.state.pending()]
        mx.async_eval([s.token for s in streams], logits, pending)  # bounds the graph to one step


class _Guess(NamedTuple):
    """A step was made over what may be a stream's next token."""

    token: mx.array
    before: Frontier
    """Of the state that the step's second position follows."""
    delta: Delta
    logits: mx.array
    """[1, V] after the token."""


class _Stream:
    """One sequence that is being decoded."""

    def __init__(self, state: SequenceState, sampler: Sampler, logits: mx.array):
        self.state, self.sampler = state, sampler
        self.token = sampler(logits.squeeze(0), state.position)
        """The next one to step over, a lazy scalar."""
        self.ahead: tuple[mx.array, mx.array] | None = None
        """A token in the state that was not handed out yet, and the logits after it."""
        self.guess: _Guess | None = None
        self.failed: Exception | None = None
        """Why no token follows: choosing it failed, which is nobody else's fault."""
        self._around: tuple[Frontier, Frontier] | None = None
        """Of the state before and after the token `ahead`."""

    def advance(self, delta: Delta, logits: mx.array) -> None:
        """Take the step over `token` into the state and choose the next; logits [1, V]."""
        before = self.state.frontier
        self.state.commit(delta, 1)
        self._around = before, self.state.frontier
        self.ahead = self.token, logits
        try:
            self.token = self.sampler(logits.squeeze(0), self.state.position)
        except Exception as error:
            self.failed = error

    def guessed_right(self) -> bool:
        """Whether the next token was guessed: then no further step is needed over it."""
        guess, self.guess = self.guess, None
        if guess is None or self.failed or self.state.frontier is not guess.before:
            return False
        if guess.token.item() != self.token.item():  # waits for the step
            return False
        self.advance(guess.delta, guess.logits)
        return True

    def take(self) -> tuple[mx.array, mx.array]:
        made, self.ahead, self._around = self.ahead, None, None
        assert made is not None
        return made

    def step_back(self) -> None:
        """Out of the state with a token that was not handed out, unless its session went on."""
        if self._around is not None and self.state.frontier is self._around[1]:
            self.state.restore(self._around[0])
        self._around = None
