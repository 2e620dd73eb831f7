"""Loss on held-out text: how much a change to a model costs, with its uncertainty.

The text is that of `tasks`: whole stories, and of conversations the answers. Two models are
compared on the same documents, whose differences are far less scattered than the losses are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
import numpy.typing as npt

from ds4py.engine.engine import Engine
from ds4py.eval import tasks
from ds4py.text import chat
from ds4py.text.tokenizer import Tokenizer

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
Progress = Callable[[str, int, int], None]
RECALL_TOKENS = 400
RESAMPLES = 2000


@dataclass(frozen=True)
class Document:
    """Token ids, of which those from `first` on are predicted."""

    ids: tuple[int, ...]
    first: int

    @property
    def n_scored(self) -> int:
        return len(self.ids) - self.first


@dataclass(frozen=True)
class Difference:
    """Mean loss of one model less that of another, nats per token, with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.4f} ({self.low:+.4f} to {self.high:+.4f})"


def documents(tokenizer: Tokenizer, n: int, seed: int) -> list[Document]:
    """`n` stories, and `n` conversations of each kind, none of them seen in training."""
    rng, made = Random(seed), []
    for i in range(n):
        story = tokenizer.encode(tasks.story_case(rng))
        made.append(Document((tokenizer.bos_id, *story, tokenizer.eos_id), 1))
        thinking = i % 3 == 2
        for case in (
            tasks.addition_case(rng, thinking),
            tasks.recall_case(rng, RECALL_TOKENS, lambda t: len(tokenizer.encode(t)), thinking),
            tasks.tool_call_case(rng, thinking),
            tasks.tool_answer_case(rng, thinking),
        ):
            prompt = tokenizer.encode(chat.segments(case.messages, case.thinking))
            whole = [*case.messages, case.reference]
            ids = tokenizer.encode(chat.segments(whole, case.thinking))
            assert ids[: len(prompt)] == prompt
            made.append(Document(tuple(ids), len(prompt)))
    return made


def scores(
    engine: Engine, texts: Sequence[Document], progress: Progress | None = None
) -> list[F32]:
    """Log-probabilities at the predicted tokens of each document, [n_scored, V]."""
    found = []
    for i, text in enumerate(texts):
        found.append(log_probabilities(engine.score(text.ids)[text.first - 1 : -1]))
        if progress is not None:
            progress("loss", i + 1, len(texts))
    return found


def losses(found: Sequence[F32], texts: Sequence[Document]) -> F64:
    """Loss of each document, in nats: the sum over its predicted tokens."""
    pairs = zip(found, texts, strict=True)
    return np.array([of_tokens(p, text.ids[text.first :]).sum() for p, text in pairs])


def divergences(reference: Sequence[F32], found: Sequence[F32]) -> F64:
    """Kullback-Leibler divergence of `found` from `reference`, summed over each document, nats."""
    pairs = zip(reference, found, strict=True)
    return np.array([(np.exp(r, dtype=np.float64) * (r - p)).sum() for r, p in pairs])


def per_token(found: F64, texts: Sequence[Document]) -> float:
    """Mean loss, nats per token."""
    return float(found.sum() / sum(text.n_scored for text in texts))


def difference(a: F64, b: F64, texts: Sequence[Document], seed: int = 0) -> Difference:
    """Mean loss of `a` less that of `b`: paired, bootstrapped over documents."""
    n_scored = np.array([text.n_scored for text in texts])
    chosen = np.random.default_rng(seed).integers(0, len(texts), (RESAMPLES, len(texts)))
    spread = (a - b)[chosen].sum(1) / n_scored[chosen].sum(1)
    low, high = np.quantile(spread, [0.025, 0.975])
    return Difference(float((a - b).sum() / n_scored.sum()), float(low), float(high))


def log_probabilities(logits: F32) -> F32:
    """Logits [T, V] -> their logarithms of probabilities."""
    wide = logits.astype(np.float64)
    top = wide.max(-1, keepdims=True)
    total = np.log(np.exp(wide - top).sum(-1, keepdims=True)) + top
    return (wide - total).astype(np.float32)


def of_tokens(found: F32, target: Sequence[int]) -> F64:
    """Negative log-probability of each target, [T]."""
    return -found[np.arange(len(target)), list(target)].astype(np.float64)
