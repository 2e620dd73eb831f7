"""Frontiers of one sequence that it can go back to, a bounded number of them.

A frontier is small and immutable; the compressed rows below it stay where they are. Going back to a
position is restoring the best frontier at or before it and stepping over the tokens between.
"""

from __future__ import annotations

from ds4py.cache.state import Frontier

GRID = 128
"""Positions where checkpoints are taken: there all frontiers of V4's ratios are empty."""
MOST = 24
"""How many are kept; older ones thin out, so that going far back costs a bounded share."""


class Checkpoints:
    """Frontiers in ascending position."""

    def __init__(self) -> None:
        self._kept: list[Frontier] = []

    def add(self, frontier: Frontier) -> None:
        """Keep a frontier at or beyond all kept ones."""
        if frontier.position == 0 or (self._kept and self._kept[-1].position == frontier.position):
            return
        self._kept.append(frontier)
        if len(self._kept) > MOST:
            self._drop_one()

    def best(self, position: int) -> Frontier | None:
        """The last one at or before `position`."""
        return next((f for f in reversed(self._kept) if f.position <= position), None)

    def forget_after(self, position: int) -> None:
        """Drop those beyond `position`: other tokens may now follow it."""
        self._kept = [f for f in self._kept if f.position <= position]

    def _drop_one(self) -> None:
        """The one whose loss costs least: the gap it leaves, relative to its age."""
        places = [0, *(f.position for f in self._kept)]
        newest = places[-1]

        def cost(i: int) -> float:
            gap = places[i + 2] - places[i]
            return gap / (newest - places[i + 1] + GRID)

        del self._kept[min(range(len(self._kept) - 1), key=cost)]
