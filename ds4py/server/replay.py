"""What the model wrote, by the ids of the calls in it: so that a conversation that comes back as
JSON, with other spaces, another order or without its reasoning, is the very tokens it was.

In memory and, where there is a directory, in SQLite, so that a restart changes nothing. A disk
that fails costs the replay, never an answer.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ds4py.server.generation import Turn
from ds4py.text.tokenizer import Tokenizer

log = logging.getLogger("ds4.server")

IN_MEMORY = 1000
ON_DISK = 20_000
"""Turns that are kept; the oldest make way."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS turns (
    id INTEGER PRIMARY KEY, thinking INTEGER, tokens TEXT, text TEXT, message TEXT);
CREATE TABLE IF NOT EXISTS calls (
    id TEXT PRIMARY KEY, turn INTEGER REFERENCES turns ON DELETE CASCADE) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS calls_of_turn ON calls (turn);
"""


class Replays:
    """Turns by the ids of their calls. Used by several threads."""

    def __init__(self, directory: Path | None = None) -> None:
        """directory: where they are kept over restarts; it must exist."""
        self._path = None if directory is None else directory / "replay.sqlite"
        self._lock = threading.Lock()
        self._turns: OrderedDict[str, Turn] = OrderedDict()
        self._database: sqlite3.Connection | None = None
        self._failed = False

    def put(self, ids: Sequence[str], turn: Turn, tokenizer: Tokenizer) -> None:
        """Keep a turn under the ids of all its calls."""
        with self._lock:
            for call_id in ids:
                self._remember(call_id, turn)
            self._write(ids, turn, tokenizer.decode(turn.tokens))

    def get(self, call_id: str, tokenizer: Tokenizer) -> Turn | None:
        """The turn with that call; None when it is not known to this model's tokenizer."""
        if not call_id.isascii():
            return None  # it is none of ours, and may be what SQLite cannot hold
        with self._lock:
            turn = self._turns.get(call_id) or self._read(call_id, tokenizer)
            if turn is not None:
                self._remember(call_id, turn)
            return turn

    def apply(self, message: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
        """An assistant's message, with its tokens where it is what the model wrote."""
        calls = message.get("tool_calls")
        if not calls:
            return message
        turn = self.get(calls[0]["id"], tokenizer)
        if turn is None or not _same(turn.message, message):
            return message
        return {**message, "sampled": {"tokens": turn.tokens, "thinking": turn.thinking}}

    def close(self) -> None:
        """Nothing more will be asked for."""
        with self._lock:
            if self._database is not None:
                self._database.close()
                self._database = None

    def _remember(self, call_id: str, turn: Turn) -> None:
        self._turns[call_id] = turn
        self._turns.move_to_end(call_id)
        while len(self._turns) > IN_MEMORY:
            self._turns.popitem(last=False)

    def _open(self) -> sqlite3.Connection | None:
        if self._database is None and self._path is not None and not self._failed:
            self._path.touch(0o600)  # before SQLite makes it readable by all
            database = sqlite3.connect(self._path, timeout=2, check_same_thread=False)
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = NORMAL")
            database.execute("PRAGMA foreign_keys = ON")
            database.executescript(_SCHEMA)
            self._database = database
        return self._database

    def _write(self, ids: Sequence[str], turn: Turn, text: str) -> None:
        try:
            if (database := self._open()) is None:
                return
            with database:
                row = (turn.thinking, json.dumps(turn.tokens), text, json.dumps(turn.message))
                made = database.execute(
                    "INSERT INTO turns (thinking, tokens, text, message) VALUES (?, ?, ?, ?)", row
                )
                database.executemany(
                    "INSERT OR REPLACE INTO calls VALUES (?, ?)",
                    [(call_id, made.lastrowid) for call_id in ids],
                )
                oldest = (made.lastrowid or 0) - ON_DISK
                database.execute("DELETE FROM turns WHERE id <= ?", (oldest,))
        except (sqlite3.Error, OSError) as error:
            self._fail(error)

    def _read(self, call_id: str, tokenizer: Tokenizer) -> Turn | None:
        try:
            if (database := self._open()) is None:
                return None
            found = database.execute(
                "SELECT thinking, tokens, text, message FROM turns "
                "JOIN calls ON calls.turn = turns.id WHERE calls.id = ?",
                (call_id,),
            ).fetchone()
            if found is None:
                return None
            thinking, tokens, text, message = found
            turn = Turn(tuple(json.loads(tokens)), bool(thinking), json.loads(message))
            # Another model's ids say something else, if anything.
            known = all(0 <= token < tokenizer.vocab_size for token in turn.tokens)
            return turn if known and tokenizer.decode(turn.tokens) == text else None
        except (sqlite3.Error, OSError, ValueError) as error:
            self._fail(error)
            return None

    def _fail(self, error: Exception) -> None:
        """Go on without the disk, and say so once."""
        log.warning("%s cannot be used (%s); calls are kept in memory only", self._path, error)
        self._failed = True
        if self._database is not None:
            self._database.close()
            self._database = None


def _same(written: dict[str, Any], given: dict[str, Any]) -> bool:
    """Whether a client's message says what the model wrote. What it left out does not count."""
    for key in ("content", "reasoning_content"):
        said = given.get(key) or ""
        if said.strip() and said.strip() != (written.get(key) or "").strip():
            return False
    calls, others = written.get("tool_calls") or [], given["tool_calls"]
    return len(calls) == len(others) and all(
        a["id"] == b["id"]
        and a["function"]["name"] == b["function"]["name"]
        and _value(a["function"]["arguments"]) == _value(b["function"]["arguments"])
        for a, b in zip(calls, others, strict=True)
    )


def _value(arguments: Any) -> Any:
    try:
        return json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        return arguments
