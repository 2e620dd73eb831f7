"""Decoding two tokens in one step: the model's draft layer guesses one, the model checks it.

Where a step over token p+1 is due, the draft layer guesses token p+2, and the step is made over
both. Its first row says what the sampler draws for p+2 anyway; only if that is the guess, the
second row is the model's, too. So the tokens, their logits and the state are those of a run without
guesses: a wrong one costs time and nothing else. Noise depends on seed, position and token id, so
the guess is drawn from the draft's logits with the noise its token will be drawn with.

Time is lost within bounds, whatever is guessed: see `Gate`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from time import perf_counter
from typing import Any

import mlx.core as mx

from ds4py.cache.state import SequenceState
from ds4py.engine.sampling import Sampler
from ds4py.model.transformer import Transformer

SHARE, HEAD_START = 0.02, 6.0
"""At most this share of the plain steps' time is lost, and the time of so many steps."""
MOST_KEPT = 20.0
"""Steps' time: of what was gained, this much may be lost again."""
MOST_COST = 4.0
"""What a step with a guess is taken to cost at most, in plain steps: one that took longer met
something else, such as kernels that were compiled."""
GAIN = 1.03
"""Guess on while it is so much faster."""
PROBE = 8
"""Steps with a guess, to see whether it pays."""
BACK_OFF = 16, 2048
"""Tokens between two probes: at first, and at most after many in vain."""
MEASURED = 3
"""Plain steps in a row that say what one costs: at the beginning of every answer, because that
depends on how much context there is."""
AGAIN = 32
"""Steps with a guess after which one plain step is measured."""
DECAY = 0.9
"""Of the averages that say whether it pays, per step."""


class Gate:
    """Says whether the next step should be made with a guess.

    A ledger holds the time that guesses lost, in plain steps; what they gained counts against it.
    A step with a guess is allowed while even the worst outcome keeps the ledger within
    SHARE * tokens + HEAD_START. So whatever is guessed, and however it was timed to mislead the
    averages, all steps together take at most (1 + SHARE) * tokens + HEAD_START plain steps' time,
    as far as a step with a guess costs at most MOST_COST.
    """

    def __init__(self) -> None:
        self._plain: deque[float] = deque(maxlen=MEASURED)
        self._owed = MEASURED
        self._tokens = 0
        self._lost = 0.0
        self._n_guesses = 0
        """Since the last probe began. So are the averages."""
        self._cost = self._made = 0.0
        self._wait, self._back_off = 0, BACK_OFF[0]

    @property
    def closed(self) -> bool:
        """Whether guesses do not pay for now."""
        return self._wait > 0

    def begin(self) -> None:
        """An answer begins."""
        self._owed = MEASURED

    def allows(self) -> bool:
        """Whether the next step may guess."""
        worst = self._lost + MOST_COST - 1
        affordable = worst <= SHARE * self._tokens + HEAD_START
        return affordable and not self._owed and not self.closed

    def plain(self, seconds: float) -> None:
        """A step without a guess took that long."""
        self._plain.append(seconds)
        self._owed = max(0, self._owed - 1)
        self._tokens += 1
        self._wait -= 1

    def guessed(self, seconds: float, n_tokens: int) -> None:
        """A step with a guess took that long and made 1 or 2 tokens."""
        cost = min(seconds / max(median(self._plain), 1e-9), MOST_COST)
        self._lost = max(self._lost + cost - n_tokens, -MOST_KEPT)
        self._tokens += n_tokens
        self._n_guesses += 1
        rate = max(1 - DECAY, 1 / self._n_guesses)
        self._cost += rate * (cost - self._cost)
        self._made += rate * (n_tokens - self._made)
        if self._n_guesses % AGAIN == 0:
            self._owed = 1
        if self._n_guesses < PROBE:
            return
        if self._made > GAIN * self._cost:
            self._back_off = BACK_OFF[0]
        else:
            self._n_guesses, self._wait = 0, self._back_off
            self._back_off = min(2 * self._back_off, BACK_OFF[1])


class Speculation:
    """One engine's guesses and what became of them. Used by one thread."""

    def __init__(self, model: Transformer, clock: Callable[[], float] = perf_counter):
        self._model, self._clock = model, clock
        self._gate = Gate()
        self._took = 0.0
        self._n_made: int | None = None
        """Tokens that the running step with a guess made; 0: it has none; None: it is not timed."""
        self.drafted = self.accepted = 0

    def guess(
        self, state: SequenceState, token: mx.array, sampler: Sampler, n_wanted: int
    ) -> mx.array | None:
        """What may follow `token`, the next one of `state`; None: a plain step is better. Lazy
        scalars.

        Asked before every step that one sequence has for itself. n_wanted: tokens that are still
        to come, `token` among them. Nothing is guessed while routing is traced: it is the tokens'.
        """
        self.end()
        draft, experts = self._model.draft, self._model.experts
        if draft is None:
            return None
        self._n_made = 0
        if n_wanted < 2 or experts.prefers or not self._gate.allows():
            return None
        self._n_made = 1
        self.drafted += 1
        tokens = token[None]
        experts.announce(tokens)
        logits = draft.logits(state.frontier.streams, tokens, state)
        return sampler.guess(logits.squeeze(0), state.position + 1)

    def confirmed(self) -> None:
        """A guess was right."""
        self.accepted += 1
        self._n_made = self._n_made and 2

    def begin(self) -> None:
        """An answer begins."""
        self.end()
        self._gate.begin()

    def end(self) -> None:
        """The step that is being timed is over."""
        n_made, self._n_made = self._n_made, None
        took, self._took = self._took, 0.0
        if n_made:
            self._gate.guessed(took, n_made)
        elif n_made == 0:
            self._gate.plain(took)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Inside, time counts: between two tokens it is the caller's."""
        since = self._clock()
        try:
            yield
        finally:
            self._took += self._clock() - since

    def stats(self) -> dict[str, Any]:
        """Counters for people and scripts; empty where nobody drafts."""
        if self._model.draft is None:
            return {}
        gate = "closed" if self._gate.closed else "open"
        return {"drafted": self.drafted, "accepted": self.accepted, "gate": gate}
