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


@dataclass
class BoundedSwaps:
    """The swaps of all layers."""

    regret: float
    """Largest loss of selection score, as a share of the layer's range."""
    counts: SwapCounts = field(default_factory=SwapCounts)

    def __post_init__(self) -> None:
        self._range: dict[int, float] = {}

    def choose(
        self, layer: int, score: Scores, bias: Scores, ids: Ids, present: Callable[[int], bool]
    ) -> tuple[Ids, list[int]]:
        """score and bias [E], the router's ids [k] best first -> ids [k], and those displaced."""
        q = score + bias
        spread = float(q.max() - q.min())
        before = self._range.get(layer, spread)
        self._range[layer] = spread = MEMORY * before + (1 - MEMORY) * spread
        ranked = np.argsort(-q, kind="stable")[:CANDIDATES]
        spare = [int(e) for e in ranked if e not in ids and present(int(e))]
        swaps: list[tuple[int, int]] = []  # place in ids, expert that steps in
        for place in range(len(ids) - 1, PROTECTED - 1, -1):
            if len(swaps) == MOST or not spare:
                break
            loss = q[ids[place]] - q[spare[0]]
            if not present(int(ids[place])) and loss <= self.regret * spread:
                swaps.append((place, spare.pop(0)))
        exact = float(score[ids].sum())
        swaps.sort(key=lambda swap: float(score[ids[swap[0]]] - score[swap[1]]))
        while swaps and self._mass(score, ids, swaps) < LEAST_MASS * exact:
            swaps.pop()  # the costliest
        chosen = ids.copy()
        for place, expert in swaps:
            chosen[place] = expert
        self.counts.slots += len(ids)
        self.counts.swapped += len(swaps)
        self.counts.kept_mass += self._mass(score, ids, swaps) / exact if exact else 1.0
        self.counts.choices += 1
        return chosen, [int(ids[place]) for place, _ in swaps]

    def _mass(self, score: Scores, ids: Ids, swaps: list[tuple[int, int]]) -> float:
        change = sum(float(score[e] - score[ids[place]]) for place, e in swaps)
        return float(score[ids].sum()) + change
