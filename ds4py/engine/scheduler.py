"""Several live sessions within one budget of KV memory, and where each request finds its prefix.

    scheduler = Scheduler(engine, kv_bytes, store)
    session = scheduler.acquire(tokens, conversation="tab-3")     # nobody else's until released
    for done, total in session.sync_slices(tokens, chunk=256):    # other sessions may run here
        ...
    for token in session.generate(options): ...                   # and here, between two tokens
    scheduler.release(session, awaiting_tool=True)

`acquire` takes whatever holds most of the prompt: an idle session of the same timeline (rewound
exactly), a fork of any other session, busy or not (rows are shared, copied on write), a snapshot on
disk, or an empty session. It makes room first: the least valuable idle session is written to the
store and dropped. Never dropped: busy sessions; one that waits for a tool's result, for a bounded
time; and, by a side request (a title, a sub-agent), the conversation that was active last.
`session.reused` after the sync says how many tokens were found.

All of it runs on the one thread that touches MLX; requests that find no room queue elsewhere
(`CapacityError.retry_after`). Knows nothing of protocols and prompts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ds4py.engine.checkpoints import GRID, MOST, TURNS_KEPT
from ds4py.engine.session import Session, check_tokens
from ds4py.errors import CapacityError
from ds4py.sizes import format_size

if TYPE_CHECKING:
    from ds4py.engine.engine import Engine

PIN_SECONDS = 120.0
"""How long a conversation that waits for a tool's result keeps its memory."""
ANSWER = 1024
"""Tokens of answer that room is made for unless told otherwise."""
CHECKPOINT_SHARE = 8
"""One session's checkpoints take at most this fraction of the budget."""
REPLY_OPENING = 8
"""Tokens at the end of a prompt that the next one may render otherwise (mode, opening of reply)."""
DISK_MARGIN = 64
"""Tokens a snapshot must save beyond what a live session has: reading them back costs as much."""


class Store(Protocol):
    """What the scheduler asks of snapshots on disk. Failing is a miss, never an error."""

    def reusable(self, tokens: Sequence[int]) -> int:
        """Tokens of the longest usable snapshot of a prefix."""
        ...

    def restore(self, session: Session, tokens: Sequence[int]) -> int:
        """Fill an empty session from that snapshot; how many tokens it then holds."""
        ...

    def keep(self, session: Session) -> bool:
        """Write what a later prompt may begin with; whether it is there, or on its way."""
        ...

    def flush(self) -> None:
        """Wait until all that was kept is on disk."""
        ...

    def respell(self, tokens: Sequence[int]) -> list[int]:
        """The same text in the ids of the longest snapshot that begins it."""
        ...


@dataclass
class _Live:
    """One session in memory and what its memory is worth."""

    session: Session
    conversation: str | None
    side: bool
    used: int
    """Number of the request that used it last."""
    prompt: int
    """Length of that request's prompt."""
    reserved: int
    """Bytes it may grow to while that request runs."""
    busy: bool = True
    pinned_until: float = 0.0
    kept: int = -1
    """Position at which it was last written to the store."""


class Scheduler:
    """Owns the live sessions of one engine. Used by one thread."""

    def __init__(
        self,
        engine: Engine,
        kv_bytes: int,
        store: Store | None = None,
        pin_seconds: float = PIN_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ):
        """kv_bytes: rows, frontiers and checkpoints of all live sessions together."""
        self._engine, self.kv_bytes, self._store = engine, kv_bytes, store
        self._pin_seconds, self._clock = pin_seconds, clock
        self._live: list[_Live] = []
        self._requests = 0
        self.counters = {"reused_live": 0, "reused_disk": 0, "read": 0, "parked": 0, "dropped": 0}

    def acquire(
        self,
        tokens: Sequence[int],
        conversation: str | None = None,
        side: bool = False,
        answer: int = ANSWER,
    ) -> Session:
        """The session that holds most of `tokens`; the caller syncs it. Release it afterwards.

        conversation: requests with the same name continue one timeline; None: told by the tokens
        alone. side: a request beside the main conversation. answer: tokens to make room for beyond
        the prompt. Raises PromptError for tokens no session can hold, CapacityError when there is
        no room for them now.
        """
        wanted = [int(token) for token in tokens]
        check_tokens(wanted, self._engine.context, self._engine.config.vocab_size)
        self._requests += 1
        found, reused = self._longest(wanted, conversation)
        on_disk = self._store.reusable(wanted) if self._store is not None else 0
        from_disk = on_disk >= reused + DISK_MARGIN
        need = self._need(len(wanted) + answer)
        if (
            found is not None
            and not from_disk
            and self._may_take(found, reused, conversation, side)
        ):
            self._make_room(need, side, found, taken=True)
            live = found
        else:
            self._make_room(need, side, found, taken=False)
            live = self._new(wanted, found, reused, from_disk)
        live.conversation, live.side, live.busy, live.reserved = conversation, side, True, need
        live.used, live.prompt, live.pinned_until = self._requests, len(wanted), 0.0
        reused = live.session.reusable(wanted)
        from_disk = from_disk and live.kept == live.session.position > 0
        self.counters["reused_disk" if from_disk else "reused_live"] += reused
        self.counters["read"] += len(wanted) - reused
        return live.session

    def adopt(self, session: Session, conversation: str | None = None) -> None:
        """Take over an idle session made elsewhere, such as one restored from a file."""
        self._requests += 1
        live = _Live(session, conversation, False, self._requests, session.position, 0, busy=False)
        self._make_room(self._n_bytes([live]), side=False, keep=None, taken=False)
        self._live.append(live)

    def release(self, session: Session, awaiting_tool: bool = False) -> None:
        """The request is over. awaiting_tool: the next one will bring a tool's result soon."""
        live = next(live for live in self._live if live.session is session)
        live.busy = False
        if awaiting_tool:
            live.pinned_until = self._clock() + self._pin_seconds
        self._keep(live)

    def respell(self, tokens: Sequence[int]) -> list[int]:
        """The same text in the ids that are already cached, where that spares reading it again.

        A model does not always spell its own text as the tokenizer would. Sync with the result of
        this instead of `tokens`, and a reply that comes back as text is found as it was generated.
        """
        wanted = [int(token) for token in tokens]
        best, reused = wanted, max((v.session.reusable(wanted) for v in self._live), default=0)
        for live in self._live:
            known = live.session.tokens
            if len(known) > reused and (other := self._engine.spelling.respell(wanted, known)):
                best, reused = other, len(known)
        if best is wanted and self._store is not None:
            return self._store.respell(wanted)
        return best

    def close(self) -> None:
        """Write what is not yet on disk and free the memory. Sessions in use stay usable."""
        for live in self._live:
            if not live.busy:
                self._keep(live)
        self._live.clear()
        if self._store is not None:
            self._store.flush()

    @property
    def n_bytes(self) -> int:
        """Memory of all live sessions; what two share counts once."""
        return self._n_bytes(self._live)

    @property
    def n_live(self) -> int:
        return len(self._live)

    def stats(self) -> dict[str, int]:
        """Counters since the start, and what is live."""
        busy = sum(live.busy for live in self._live)
        return {**self.counters, "live": self.n_live, "busy": busy, "kv_bytes": self.n_bytes}

    def _longest(self, tokens: list[int], conversation: str | None) -> tuple[_Live | None, int]:
        """The live session that holds most of the tokens, at equal length the own, idle, latest."""

        def worth(live: _Live) -> tuple[int, bool, bool, int]:
            own = conversation is not None and live.conversation == conversation
            return live.session.reusable(tokens), own, not live.busy, live.used

        best = max(self._live, key=worth, default=None)
        reused = best.session.reusable(tokens) if best is not None else 0
        return (best, reused) if reused else (None, 0)

    def _may_take(self, live: _Live, reused: int, conversation: str | None, side: bool) -> bool:
        """Whether the request continues that timeline, so that its end is no loss."""
        if live.busy or (side and not live.side):
            return False
        if conversation is not None and live.conversation == conversation:
            return True
        return reused >= min(live.prompt - REPLY_OPENING, live.session.position)

    def _new(self, tokens: list[int], donor: _Live | None, reused: int, from_disk: bool) -> _Live:
        session = Session(self._engine, self.kv_bytes // CHECKPOINT_SHARE)
        live = _Live(session, None, False, self._requests, len(tokens), reserved=0)
        if from_disk and self._store is not None:
            live.kept = self._store.restore(session, tokens)
        if donor is not None and session.position < reused:  # also where the disk let us down
            live.session = donor.session.fork(reused)
        self._live.append(live)
        return live

    def _need(self, n_tokens: int) -> int:
        """Most that a session of that length takes, with its checkpoints."""
        n_tokens = min(n_tokens, self._engine.context)
        state = self._engine.model.new_state()
        kept = min(MOST, n_tokens // GRID + TURNS_KEPT + 2) * state.frontier.n_bytes
        return state.n_bytes_at(n_tokens) + min(kept, self.kv_bytes // CHECKPOINT_SHARE)

    def _n_bytes(self, sessions: list[_Live]) -> int:
        arrays: dict[int, int] = {}
        for live in sessions:
            arrays |= live.session.arrays()
        return sum(arrays.values())

    def _committed(self, without: _Live | None) -> int:
        """Memory that is taken or promised to sessions in use."""
        others = [live for live in self._live if live is not without]
        growth = sum(max(v.reserved - self._n_bytes([v]), 0) for v in others if v.busy)
        return self._n_bytes(others) + growth

    def _make_room(self, need: int, side: bool, keep: _Live | None, taken: bool) -> None:
        """Drop the least valuable sessions until one of `need` bytes fits. Raises CapacityError.

        keep: the session that holds the prefix, which is `taken` or forked.
        """
        if need > self.kv_bytes:
            raise CapacityError(
                f"the prompt needs {format_size(need)} of KV memory but there are "
                f"{format_size(self.kv_bytes)}; give more memory or shorten the prompt",
                retry_after=None,
            )
        while self._committed(keep if taken else None) + need > self.kv_bytes:
            victim = self._least_valuable(side, keep)
            if victim is None:
                raise CapacityError(
                    f"{len(self._live)} sessions in use leave no room for another of "
                    f"{format_size(need)}; wait for one to end",
                    retry_after=self._next_change(),
                )
            self._drop(victim)

    def _least_valuable(self, side: bool, keep: _Live | None) -> _Live | None:
        """Side requests' sessions first, then the one that was unused for longest."""
        now = self._clock()
        idle = [v for v in self._live if not v.busy and v.pinned_until <= now and v is not keep]
        if side:  # the conversation that was active last keeps its memory
            main = max((v for v in self._live if not v.side), key=lambda v: v.used, default=None)
            idle = [v for v in idle if v is not main and (v.side or self._store is not None)]
        return min(idle, key=lambda v: (not v.side, v.used), default=None)

    def _drop(self, live: _Live) -> None:
        kept = self._keep(live)
        self.counters["parked" if kept else "dropped"] += 1
        self._live.remove(live)

    def _keep(self, live: _Live) -> bool:
        """Write a session to the store unless it is there already or a side request's."""
        if self._store is None or live.side:
            return False
        if live.kept != live.session.position and self._store.keep(live.session):
            live.kept = live.session.position
        return live.kept == live.session.position

    def _next_change(self) -> float:
        """Seconds until a pinned session may be dropped; a moment when all are busy."""
        now = self._clock()
        waits = [v.pinned_until - now for v in self._live if not v.busy and v.pinned_until > now]
        return min(waits, default=1.0)
