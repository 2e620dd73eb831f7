"""Where a command keeps its sessions: memory for the live ones, a directory for the others.

`Timelines` stands for the engine where a conversation only needs sessions: behind each of its
timelines the scheduler finds the prefix of every turn anew.
"""

import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds4py.cli.conversation import Progress
from ds4py.cli.settings import kv_directory
from ds4py.errors import InputError
from ds4py.sizes import parse_size

if TYPE_CHECKING:
    from ds4py import Engine, SamplingOptions, Session, Token
    from ds4py.cache.store import Store
    from ds4py.engine.disk import DiskSessions
    from ds4py.engine.scheduler import Scheduler

DEFAULT_SPACE = "8GB"
LIVE_SESSIONS = 4
"""Whole contexts that a chat keeps in memory where there is room for them."""


def kv_space(option: str | None) -> int:
    """`--kv-space` in bytes; 0: nothing is kept on disk. Raises OptionsError."""
    text = DEFAULT_SPACE if option is None else option
    return 0 if text.strip() == "0" else parse_size(text, "--kv-space")


def open_store(directory: str | None, space: str | None) -> "Store | None":
    """The store of the two options; None where nothing is to be kept.

    A directory that was asked for and cannot be used is an error; of the usual one it is told.
    """
    n_bytes, path = kv_space(space), kv_directory(directory)
    if path is None or not n_bytes:
        return None
    from ds4py.cache.store import Store

    try:
        return Store.open(path, n_bytes)
    except InputError as error:
        if directory is not None:
            raise
        print(f"ds4: without sessions on disk: {error}", file=sys.stderr, flush=True)
        return None


def open_disk(
    engine: "Engine", directory: str | None, space: str | None, background: bool = False
) -> "DiskSessions | None":
    """An engine's sessions in that store; background: answers do not wait for the disk."""
    from ds4py.engine.disk import DiskSessions

    store = open_store(directory, space)
    return None if store is None else DiskSessions(engine, store, background)


def make_scheduler(engine: "Engine", disk: "DiskSessions | None") -> "Scheduler":
    """Sessions of one person: as much memory as a few contexts take, where it is to spare."""
    from ds4py.engine.scheduler import Scheduler

    one = engine.session_bytes(engine.context)
    return Scheduler(engine, max(one, min(LIVE_SESSIONS * one, engine.plan.spare)), disk)


class Timelines:
    """Makes sessions as an engine does, each the scheduler's."""

    def __init__(self, engine: "Engine", scheduler: "Scheduler") -> None:
        self.name, self.context = engine.name, engine.context
        self._engine, self._scheduler = engine, scheduler
        self._numbers = itertools.count(1)
        self._last: Timeline | None = None

    def session(self) -> "Timeline":
        """An empty timeline; the one before it is over."""
        if self._last is not None:
            self._last.discard()
        self._last = Timeline(self._scheduler, f"chat-{next(self._numbers)}")
        return self._last

    def restore(self, path: Path) -> "Timeline":
        """A timeline from a file that `save` wrote. Raises InputError."""
        session = self._engine.restore(path)
        timeline = self.session()
        timeline.begin(session)
        return timeline

    def stats(self) -> dict[str, Any]:
        """The engine's counters."""
        return self._engine.stats()


class Timeline:
    """One conversation; what is used of a Session, on whichever session has most of the prompt."""

    def __init__(self, scheduler: "Scheduler", conversation: str) -> None:
        self._scheduler, self._conversation = scheduler, conversation
        self._session: Session | None = None
        self._acquired = False

    def begin(self, session: "Session") -> None:
        """Go on with a session made elsewhere."""
        self._scheduler.adopt(session, self._conversation)
        self._session = session

    def sync(self, tokens: Sequence[int], progress: Progress | None = None) -> int:
        """As `Session.sync`; acquires the session that the answer then uses."""
        tokens = self._scheduler.respell(tokens)
        self._session = session = self._scheduler.acquire(tokens, self._conversation)
        self._acquired = True
        try:
            return session.sync(tokens, progress)
        except BaseException:
            self.discard()
            raise

    def generate(self, options: "SamplingOptions") -> Iterator["Token"]:
        """As `Session.generate`; the session is released when the answer ends."""
        session = self._session
        assert session is not None, "sync comes first"
        try:
            yield from session.generate(options)
        finally:
            if self._acquired:
                self._acquired = False
                self._scheduler.release(session)

    def save(self, path: Path) -> None:
        """Write the conversation's state. Raises InputError."""
        if self._session is None:
            raise InputError("nothing was said yet")
        self._session.save(path)

    def discard(self) -> None:
        """Give back a session whose prompt was not read to the end; what was read stays there."""
        if self._acquired and self._session is not None:
            self._acquired = False
            self._scheduler.release(self._session)
