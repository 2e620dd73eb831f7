"""Which session answers a prompt: the free one that holds the longest part of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ds4py.engine.engine import Engine
from ds4py.engine.session import Session


class Sessions(Protocol):
    """Lends sessions. All calls come from the thread that owns the engine."""

    def acquire(self, tokens: Sequence[int]) -> Session | None:
        """The best session for a prompt; None while all are lent."""
        ...

    def release(self, session: Session) -> None:
        """Take it back: what it holds is there for the next prompt that begins so."""
        ...

    def discard(self, session: Session) -> None:
        """Take back one whose state is in doubt."""
        ...

    def close(self) -> None:
        """Nothing more will be asked for."""
        ...


class LiveSessions:
    """Up to `slots` sessions in memory."""

    MIN_SHARED = 32
    """A session that shares less than this is kept for whoever comes back to it."""

    def __init__(self, engine: Engine, slots: int) -> None:
        self._engine = engine
        self._slots = slots
        self._free: list[Session] = []  # least recently used first
        self._n_lent = 0

    def acquire(self, tokens: Sequence[int]) -> Session | None:
        if self._n_lent == self._slots:
            return None
        self._n_lent += 1
        best = max(self._free, key=lambda session: _shared(session, tokens), default=None)
        has_room = self._n_lent + len(self._free) <= self._slots
        if best is None or (has_room and _shared(best, tokens) < self.MIN_SHARED):
            return self._engine.session()
        if _shared(best, tokens) < self.MIN_SHARED:
            best = self._free[0]
        self._free.remove(best)
        return best

    def release(self, session: Session) -> None:
        self._n_lent -= 1
        self._free.append(session)

    def discard(self, session: Session) -> None:
        self._n_lent -= 1

    def close(self) -> None:
        self._free.clear()


def _shared(session: Session, tokens: Sequence[int]) -> int:
    n = 0
    for held, wanted in zip(session.tokens, tokens, strict=False):
        if held != wanted:
            break
        n += 1
    return n
