"""Sessions on disk: which positions of a session are worth a snapshot, and what a prompt finds.

The engine's side of `cache.store`: it knows identity, spelling and turns. Implements the
scheduler's `Store`. Where answers must not wait for a disk, a thread writes: it touches host arrays
and files only.
"""

from __future__ import annotations

import hashlib
import logging
import queue
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ds4py.cache.index import Found
from ds4py.cache.snapshot import Image
from ds4py.cache.state import Frontier
from ds4py.cache.store import Store
from ds4py.engine.session import Session
from ds4py.errors import PromptError
from ds4py.text.messages import ASSISTANT, DSML, THINK

if TYPE_CHECKING:
    from ds4py.engine.engine import Engine

log = logging.getLogger("ds4.engine")

FEWEST = 32
"""Tokens below which a prefix is read faster than it is found."""
MOST_WAITING = 8
"""Images that wait for the writing thread; each is a session's new rows and a frontier."""
WORTH = 256
"""Tokens of a prompt that deserve a snapshot though no conversation will go on from there."""


class DiskSessions:
    """One engine's sessions in a store that other engines and processes may share."""

    def __init__(self, engine: Engine, store: Store, background: bool = False):
        """background: `keep` returns before its files are written; `flush` waits for them."""
        self._engine, self.store = engine, store
        self._identity = engine.identity
        self._writer = _Writer(store) if background else None

    def reusable(self, tokens: Sequence[int]) -> int:
        """Tokens of the longest usable snapshot of a prefix."""
        return next((found.tokens for found in self._usable(list(tokens))), 0)

    def restore(self, session: Session, tokens: Sequence[int]) -> int:
        """Fill an empty session from that snapshot; how many tokens it then holds."""
        wanted = list(tokens)
        for found in self._usable(wanted):
            image = self.store.load(found, wanted[: found.tokens])
            if image is None:
                continue
            try:
                session.adopt(image)
            except (ValueError, PromptError):
                continue  # made for another context, or by a program that wrote something else
            self.store.use(self._identity, self._engine.spelling.text(wanted), wanted)
            return found.tokens
        return 0

    def keep(self, session: Session, reply: bool = True) -> bool:
        """Write what a later prompt may begin with; whether the latest of it is in the store.

        That is the end of the first turn's preamble, which other conversations share, and the end
        of the session, or where its last reply opened if that will be rendered anew.
        reply: whether the conversation is expected to go on.
        """
        tokens, turns = session.tokens, session.turns()
        first = self._engine.turns(tokens, 0)[:1]
        ends: list[Frontier | None] = [f for f in turns if [f.position] == first]
        whole = not turns or (reply and self._reply_stays(tokens))
        last = None if whole else turns[-1]
        common = ends[0].position if ends and ends[0] is not None else 0
        if reply or (session.position if last is None else last.position) - common >= WORTH:
            ends.append(last)
        written = [self._write(session, tokens, end) for end in ends]
        return bool(written) and written[-1]

    def flush(self) -> None:
        """Wait until all that was kept is on disk."""
        if self._writer is not None:
            self._writer.flush()

    def respell(self, tokens: Sequence[int]) -> list[int]:
        """The same text in the ids of the longest snapshot that begins it."""
        wanted, spelling = list(tokens), self._engine.spelling
        usable = self.reusable(wanted)
        for found in self.store.prefixes(self._identity, spelling.text(wanted)):
            if found.tokens <= usable:
                break
            other = spelling.respell(wanted, self.store.ids(found))
            if other is not None:
                return other
        return wanted

    def _usable(self, tokens: list[int]) -> list[Found]:
        """Snapshots of prefixes of these ids, the longest first."""
        text = self._engine.spelling.text(tokens)
        ids = np.asarray(tokens, "<i4").tobytes()
        return [
            found
            for found in self.store.prefixes(self._identity, text)
            if found.tokens <= len(tokens)
            and hashlib.sha256(ids[: 4 * found.tokens]).digest() == found.ids_hash
        ]

    def _write(self, session: Session, tokens: list[int], end: Frontier | None) -> bool:
        position = session.position if end is None else end.position
        if position < FEWEST:
            return False
        ids = tokens[:position]
        start = self.store.stored_tokens(self._identity, ids)
        image, text = session.image(end, start), self._engine.spelling.text(ids)
        if self._writer is not None:
            return self._writer.put(self._identity, image, text)
        return self.store.save(self._identity, image, text)

    def _reply_stays(self, tokens: list[int]) -> bool:
        """Whether the next prompt will hold the last reply as it is: reasoning is dropped from the
        history unless tools are offered."""
        tokenizer = self._engine.tokenizer
        if tokenizer is None:
            return True
        think, assistant, dsml = (tokenizer.control_id(t) for t in (THINK, ASSISTANT, DSML))
        opened = len(tokens) - tokens[::-1].index(assistant) if assistant in tokens else 0
        reasons = opened and tokens[opened : opened + 1] == [think]
        return not reasons or dsml in tokens[:opened]


class _Writer:
    """Saves images on a thread of its own, through a store of its own: to the first store it is
    like another process."""

    def __init__(self, store: Store):
        self._place = store.directory, store.n_bytes
        self._waiting: queue.Queue[tuple[str, Image, bytes]] = queue.Queue(MOST_WAITING)
        self._told = False
        self._thread = threading.Thread(target=self._run, name="kv writer", daemon=True)
        self._thread.start()

    def put(self, identity: str, image: Image, text: bytes) -> bool:
        """Queue an image; False when the disk is so far behind that it is better dropped."""
        try:
            self._waiting.put_nowait((identity, image, text))
        except queue.Full:
            return False
        return True

    def flush(self) -> None:
        self._waiting.join()

    def _run(self) -> None:
        store: Store | None = None
        while True:
            work = self._waiting.get()
            try:
                store = store or Store(*self._place)
                if not store.save(*work):
                    self._tell(store.trouble)
            except Exception as exc:  # whatever it is, answers go on and `flush` returns
                self._tell(f"{type(exc).__name__}: {exc}")
            finally:
                self._waiting.task_done()

    def _tell(self, trouble: str | None) -> None:
        """Once: a disk that is full would fail after every answer."""
        if trouble is not None and not self._told:
            log.warning("a session was not saved: %s", trouble)
            self._told = True
