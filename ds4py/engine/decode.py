"""The decode loop: all the work of one token, in the order it happens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import mlx.core as mx

from ds4py.cache.state import SequenceState
from ds4py.engine.sampling import Sampler
from ds4py.model.transformer import Transformer


def decode(
    model: Transformer, state: SequenceState, logits: mx.array, sampler: Sampler, n_tokens: int
) -> Iterator[tuple[int, mx.array]]:
    """Yield up to `n_tokens` (token id, logits after it); each is in the state when it is yielded.

    logits [1, V]: those after the state's last token. The step after a token is launched before the
    token is handed out, so that a GPU works while the caller prints.
    """
    token = sampler(logits[-1], state.position)
    for _ in range(n_tokens):
        logits, delta = model.step(token[None], state)
        state.commit(delta, 1)
        following = sampler(logits[-1], state.position)
        mx.async_eval(following, logits, *state.pending())  # bounds the graph to one step
        yield (
            cast(int, token.item()),
            logits,
        )  # waits for the step before, not for the one just launched
        token = following
