"""Cache-aware routing: an expert that would have to be read gives way to one that is in memory.

It changes what the model computes, so it is off unless asked for, for decoding only, and bounded
token by token: the two best experts are never touched, at most two are swapped, each for one whose
selection score is lower by at most a share of the layer's range, and what is chosen keeps 98 % of
the unmodified choice's score mass. Weights come from the unmodified scores. What is chosen depends
on what was in memory, so it cannot be repeated exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ds4py.experts.policy import Ids

Scores = npt.NDArray[np.floating]

PROTECTED = 2
"""Best-ranked experts that are never swapped."""
MOST = 2
"""Swaps per layer and token."""
CANDIDATES = 32
"""Only experts ranked this high may step in."""
LEAST_MASS = 0.98
"""Share of the unmodified choice's scores that must be kept."""
MEMORY = 0.99
"""Of the running mean of a layer's score range."""


@dataclass
class SwapCounts:
    """What cache-aware routing did."""

    slots: int = 0
    """Experts chosen in the layers it applies to."""
    swapped: int = 0
    kept_mass: float = 0.0
    """Sum over layers and tokens of the share of score mass kept."""
    choices: int = 0
    """Layers and tokens."""

    @property
    def swapped_share(self) -> float:
        """Of the experts chosen."""
        return self.swapped / max(1, self.slots)

    @property
    def kept_share(self) -> float:
        """Of the score mass, on average."""
        return self.kept_mass / self.choices if self.choices else 1.0


@dataclass(frozen=True)
class Ranked:
    """One token's best experts in one layer, at most CANDIDATES: what a swap looks at."""

    ids: Ids
    """Best first; the router's choice are the first k."""
    q: Scores
    """Their selection scores."""
    score: Scores
    """The same without bias."""
    spread: float
    """The best selection score less the worst of all experts'."""

    @staticmethod
    def of(score: Scores, bias: Scores) -> Ranked:
        """From score and bias [E]; ties go to the lower id, as in the router."""
        q = score + bias
        ids = np.argsort(-q, kind="stable")
        return Ranked(ids[:CANDIDATES], q[ids[:CANDIDATES]], score[ids[:CANDIDATES]], np.ptp(q))


@dataclass
class BoundedSwaps:
    """The swaps of all layers."""

    regret: float
    """Largest loss of selection score, as a share of the layer's range."""
    counts: SwapCounts = field(default_factory=SwapCounts)

    def __post_init__(self) -> None:
        self._range: dict[int, float] = {}

    def choose(
        self, layer: int, ranked: Ranked, k: int, present: Callable[[int], bool]
    ) -> tuple[Ids, list[int]]:
        """The k experts to compute with, and those of the router's choice that gave way."""
        q, score, spread = ranked.q, ranked.score, float(ranked.spread)
        before = self._range.get(layer, spread)
        self._range[layer] = spread = MEMORY * before + (1 - MEMORY) * spread
        here = [present(expert) for expert in ranked.ids.tolist()]
        spare = [rank for rank in range(k, len(here)) if here[rank]]
        swaps: list[tuple[int, int]] = []  # ranks: who gives way, who steps in
        for rank in range(k - 1, PROTECTED - 1, -1):
            if len(swaps) == MOST or not spare:
                break
            if not here[rank] and q[rank] - q[spare[0]] <= self.regret * spread:
                swaps.append((rank, spare.pop(0)))
        exact = float(score[:k].sum())
        swaps.sort(key=lambda swap: float(score[swap[0]] - score[swap[1]]))
        while swaps and _mass(score, k, swaps) < LEAST_MASS * exact:
            swaps.pop()  # the costliest
        chosen = ranked.ids[:k].copy()
        for rank, other in swaps:
            chosen[rank] = ranked.ids[other]
        self.counts.slots += k
        self.counts.swapped += len(swaps)
        self.counts.kept_mass += _mass(score, k, swaps) / exact if exact else 1.0
        self.counts.choices += 1
        return chosen, [int(ranked.ids[rank]) for rank, _ in swaps]


def _mass(score: Scores, k: int, swaps: list[tuple[int, int]]) -> float:
    """Score mass of a choice with these swaps."""
    return float(score[:k].sum()) + sum(float(score[b] - score[a]) for a, b in swaps)
