"""Frontiers of one sequence that it can go back to, a bounded number of them.

A frontier is small and immutable; the compressed rows below it stay where they are. Going back to a
position is restoring the best frontier at or before it and stepping over the tokens between.
"""

from __future__ import annotations

from dataclasses import dataclass

from ds4py.cache.state import Frontier

GRID = 128
"""Positions where checkpoints are taken: there all frontiers of V4's ratios are empty."""
MOST = 24
"""How many are kept; older ones thin out, so that going far back costs a bounded share."""
MOST_BYTES = 256_000_000
"""What they may take together, unless the memory plan says otherwise: 60 of Flash on the grid."""
TURNS_KEPT = 4
"""Beginnings of turns, from the end of a prompt, where a checkpoint is taken."""
TURN = 8
"""How much sooner a session goes back to where a turn began than to a place like any other."""


@dataclass(frozen=True)
class _Kept:
    frontier: Frontier
    turn: bool

    @property
    def position(self) -> int:
        return self.frontier.position


class Checkpoints:
    """Frontiers in ascending position."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._kept: list[_Kept] = []
        self._most_bytes = most_bytes

    def add(self, frontier: Frontier, turn: bool = False) -> None:
        """Keep a frontier at or beyond all kept ones; turn: a turn begins or ends there."""
        if frontier.position == 0:
            return
        if self._kept and self._kept[-1].position == frontier.position:
            turn = turn or self._kept.pop().turn
        self._kept.append(_Kept(frontier, turn))
        while len(self._kept) > MOST or (len(self._kept) > 1 and self.n_bytes > self._most_bytes):
            self._drop_one()

    def best(self, position: int) -> Frontier | None:
        """The last one at or before `position`."""
        return next((k.frontier for k in reversed(self._kept) if k.position <= position), None)

    def frontiers(self) -> list[Frontier]:
        """All, ascending."""
        return [k.frontier for k in self._kept]

    def turns(self) -> list[Frontier]:
        """Those where a turn begins or ends, ascending."""
        return [k.frontier for k in self._kept if k.turn]

    def up_to(self, position: int) -> Checkpoints:
        """A second set with those at or before `position`; frontiers are shared."""
        other = Checkpoints(self._most_bytes)
        other._kept = [k for k in self._kept if k.position <= position]
        return other

    def forget_after(self, position: int) -> None:
        """Drop those beyond `position`: other tokens may now follow it."""
        self._kept = [k for k in self._kept if k.position <= position]

    @property
    def n_bytes(self) -> int:
        return sum(k.frontier.n_bytes for k in self._kept)

    def _drop_one(self) -> None:
        """The one whose loss costs least: the gap it leaves, relative to its age."""
        places = [0, *(k.position for k in self._kept)]
        newest = places[-1]

        def cost(i: int) -> float:
            gap = places[i + 2] - places[i]
            weight = TURN if self._kept[i].turn else 1
            return weight * gap / (newest - places[i + 1] + GRID)

        del self._kept[min(range(len(self._kept) - 1), key=cost)]
