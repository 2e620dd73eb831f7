"""Answers of the Responses API that a later request may refer to or ask for.

In SQLite: a file where there is a directory, so that a restart changes nothing, else in memory.
Items are stored once, however many responses hold them: a conversation of n turns is not stored n
times over. A disk that fails costs what was kept, never an answer. All of it runs on one thread, in
the order it was asked for: `put` returns at once, and what is read after it sees it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sqlite3
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

log = logging.getLogger("ds4.server")

MAX_RESPONSES = 10_000
MAX_BYTES = 64 << 20
"""Most responses, and most bytes of their items as JSON; the oldest responses make way."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS responses (
    n INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, n_input INTEGER, body TEXT);
CREATE TABLE IF NOT EXISTS items (
    n INTEGER PRIMARY KEY, digest BLOB UNIQUE NOT NULL, id TEXT, value TEXT);
CREATE INDEX IF NOT EXISTS items_by_id ON items (id);
CREATE TABLE IF NOT EXISTS uses (
    response INTEGER REFERENCES responses ON DELETE CASCADE, place INTEGER, item INTEGER,
    PRIMARY KEY (response, place)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS uses_by_item ON uses (item);
"""

Found = TypeVar("Found")


class Kept:
    """Responses by their id. Used by several threads."""

    def __init__(
        self,
        directory: Path | None = None,
        max_bytes: int = MAX_BYTES,
        max_responses: int = MAX_RESPONSES,
    ) -> None:
        """directory: where they are kept over restarts; it must exist."""
        self._path = None if directory is None else directory / "responses.sqlite"
        self._max_bytes, self._max_responses = max_bytes, max_responses
        self._database: sqlite3.Connection | None = None
        self._n_bytes = 0
        self._thread = ThreadPoolExecutor(1, "responses")

    def put(self, response: dict[str, Any], history: Sequence[Any]) -> None:
        """Keep a complete response and the items that led to it."""
        body = {key: value for key, value in response.items() if key != "output"}
        items = [*history, *response["output"]]
        self._thread.submit(self._try, lambda: self._put(body, items, len(history)), None)

    def history(self, response_id: str) -> list[Any] | None:
        """All items of a conversation up to this answer; None when it is not known."""
        return self._asked(lambda: self._items(response_id), None)

    def response(self, response_id: str) -> dict[str, Any] | None:
        """The response as it was answered."""
        return self._asked(lambda: self._response(response_id), None)

    def inputs(self, response_id: str) -> list[Any] | None:
        """The items that led to a response."""
        return self._asked(lambda: self._items(response_id, answer=False), None)

    def item(self, item_id: str) -> Any:
        """One item of a conversation; None when it is not known."""
        return self._asked(lambda: self._item(item_id), None)

    def delete(self, response_id: str) -> bool:
        """Forget a response, and its items unless others hold them; whether it was known."""
        if not _is_known_kind(response_id):
            return False
        return self._asked(lambda: self._delete("id = ?", response_id), False)

    def close(self) -> None:
        """Nothing more will be asked for; what was put is on disk."""
        self._thread.submit(self._close)
        self._thread.shutdown()

    # What follows runs on the thread.

    def _asked(self, ask: Callable[[], Found], otherwise: Found) -> Found:
        return self._thread.submit(self._try, ask, otherwise).result()

    def _try(self, ask: Callable[[], Found], otherwise: Found) -> Found:
        """Ask the database; where the disk fails, say so once and go on in memory."""
        try:
            self._open()
            return ask()
        except (sqlite3.Error, OSError, ValueError) as error:
            log.warning(
                "%s cannot be used (%s); responses are kept in memory only", self._path, error
            )
            self._close()
            self._path = None
            return otherwise

    @property
    def _connection(self) -> sqlite3.Connection:
        assert self._database is not None
        return self._database

    def _open(self) -> None:
        if self._database is not None:
            return
        if self._path is not None:
            self._path.touch(0o600)  # before SQLite makes it readable by all
        self._database = sqlite3.connect(self._path or ":memory:", timeout=2)
        for pragma in ("journal_mode = WAL", "synchronous = NORMAL", "foreign_keys = ON"):
            self._database.execute(f"PRAGMA {pragma}")
        self._database.executescript(_SCHEMA)
        total = self._database.execute("SELECT total(length(value)) FROM items")
        self._n_bytes = int(total.fetchone()[0])

    def _close(self) -> None:
        if self._database is not None:
            self._database.close()
            self._database = None

    def _put(self, body: dict[str, Any], items: list[Any], n_input: int) -> None:
        with self._connection as database:
            made = database.execute(
                "INSERT INTO responses (id, n_input, body) VALUES (?, ?, ?)",
                (body["id"], n_input, json.dumps(body)),
            ).lastrowid
            places = [(made, place, self._stored(item)) for place, item in enumerate(items)]
            database.executemany("INSERT INTO uses VALUES (?, ?, ?)", places)
        self._delete("n <= (SELECT max(n) FROM responses) - ?", self._max_responses)
        oldest = "n = (SELECT min(n) FROM responses) AND n < (SELECT max(n) FROM responses) AND ?"
        while self._n_bytes > self._max_bytes and self._delete(oldest, True):
            pass

    def _stored(self, item: Any) -> int:
        """The number of an item, which is there from now on."""
        text = json.dumps(item)
        digest = hashlib.sha256(text.encode()).digest()
        database = self._connection
        found = database.execute("SELECT n FROM items WHERE digest = ?", (digest,)).fetchone()
        if found is not None:
            return int(found[0])
        item_id = item.get("id") if isinstance(item, dict) else None
        made = database.execute(
            "INSERT INTO items (digest, id, value) VALUES (?, ?, ?)",
            (digest, item_id if _is_known_kind(item_id) else None, text),
        )
        self._n_bytes += len(text)
        return int(made.lastrowid or 0)

    def _delete(self, which: str, value: Any) -> bool:
        """Delete responses and the items that only they held; whether there were any."""
        with self._connection as database:
            gone = f"SELECT n FROM responses WHERE {which}"
            items = f"SELECT DISTINCT item FROM uses WHERE response IN ({gone})"
            held = database.execute(items, (value,)).fetchall()
            n_gone = database.execute(f"DELETE FROM responses WHERE {which}", (value,)).rowcount
            for row in held:
                unused = database.execute(
                    "DELETE FROM items WHERE n = ?1 AND NOT EXISTS "
                    "(SELECT 1 FROM uses WHERE item = ?1) RETURNING length(value)",
                    row,
                ).fetchone()
                self._n_bytes -= unused[0] if unused else 0
        return n_gone > 0

    def _items(self, response_id: str, answer: bool = True) -> list[Any] | None:
        known = self._row("SELECT n, n_input FROM responses WHERE id = ?", response_id)
        if known is None:
            return None
        found = self._connection.execute(
            "SELECT value FROM uses JOIN items ON items.n = item WHERE response = ? "
            "AND place < ? ORDER BY place",
            (known[0], sys.maxsize if answer else known[1]),
        )
        return [json.loads(value) for (value,) in found]

    def _response(self, response_id: str) -> dict[str, Any] | None:
        found = self._row("SELECT body, n_input FROM responses WHERE id = ?", response_id)
        items = self._items(response_id)
        if found is None or items is None:
            return None
        return {**json.loads(found[0]), "output": items[found[1] :]}

    def _item(self, item_id: str) -> Any:
        found = self._row("SELECT value FROM items WHERE id = ? ORDER BY n DESC", item_id)
        return None if found is None else json.loads(found[0])

    def _row(self, query: str, value: str) -> Any:
        if not _is_known_kind(value):
            return None
        return self._connection.execute(query, (value,)).fetchone()


def _is_known_kind(name: Any) -> bool:
    """Whether it can be an id: ours are ASCII, and SQLite cannot hold half a surrogate pair."""
    return isinstance(name, str) and name.isascii()
