"""Guesses that a test controls, and what sessions are compared by."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from ds4py import Engine, Session
from ds4py.cache.state import SequenceState
from ds4py.engine.sampling import Sampler
from ds4py.engine.speculative import Speculation


class Told(Speculation):
    """Guesses the tokens of a known sequence where `right` says so, else others."""

    def __init__(self, engine: Engine, tokens: list[int], right: Callable[[int], bool]):
        super().__init__(engine.model)
        self.tokens, self.right = tokens, right
        self.n_vocabulary = engine.config.vocab_size

    def guess(
        self, state: SequenceState, token: mx.array, sampler: Sampler, n_wanted: int
    ) -> mx.array | None:
        at = state.position + 1
        if n_wanted < 2 or at >= len(self.tokens):
            return None
        self.drafted += 1
        wrong = (self.tokens[at] + 1) % self.n_vocabulary
        return mx.array(self.tokens[at] if self.right(at) else wrong, mx.int32)


class Eager(Speculation):
    """The draft layer guesses at every step, whatever the clock says."""

    def __init__(self, engine: Engine):
        super().__init__(engine.model)
        self._gate.allows = lambda: True  # type: ignore[method-assign]
        self._gate.guessed = lambda *_: None  # type: ignore[method-assign]


class Counted(Speculation):
    """Time is counted: 1 for a plain step, `cost` for one with a guess."""

    def __init__(self, engine: Engine, cost: float):
        self.now = 0.0
        super().__init__(engine.model, lambda: self.now)
        self.cost = cost

    def guess(self, *step: Any) -> mx.array | None:
        made = super().guess(*step)
        self.now += 1 if made is None else self.cost
        return made


def started(engine: Engine, prompt: list[int]) -> Session:
    session = engine.session()
    session.sync(prompt)
    return session


def content(session: Session, drafts: bool = True) -> dict[str, bytes]:
    """Everything a session's future depends on."""
    image = session.image()
    found = {**image.rows, **image.frontier, "tokens": image.tokens, "logits": session.logits()}
    if not drafts:
        found.pop("draft", None)
    return {name: np.asarray(array).tobytes() for name, array in found.items()}
