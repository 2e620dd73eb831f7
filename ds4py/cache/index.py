"""What a store holds, in SQLite: found without opening a single file, and rebuilt from them.

Rows never say more than the files do; a lost or damaged index costs a scan of headers. All times
are numbers of uses, so no clock matters; `created` is for people.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ds4py.cache.evict import Entry, Segment, Tree

SCHEMA = 3
_TABLES = """
CREATE TABLE IF NOT EXISTS segments(
    name TEXT PRIMARY KEY, parent TEXT, identity TEXT NOT NULL, ids BLOB NOT NULL,
    bytes INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS snapshots(
    name TEXT PRIMARY KEY, parent TEXT, identity TEXT NOT NULL, tail BLOB NOT NULL,
    tokens INTEGER NOT NULL, ids_hash BLOB NOT NULL, text_bytes INTEGER NOT NULL,
    text_hash BLOB NOT NULL, bytes INTEGER NOT NULL,
    created REAL NOT NULL, used INTEGER NOT NULL, hits INTEGER NOT NULL DEFAULT 0,
    born INTEGER NOT NULL, uses INTEGER NOT NULL DEFAULT 0,
    next BLOB, branched INTEGER NOT NULL DEFAULT 0) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS clock(uses INTEGER NOT NULL);
INSERT INTO clock SELECT 0 WHERE NOT EXISTS (SELECT 1 FROM clock);
CREATE INDEX IF NOT EXISTS by_text ON snapshots(identity, text_bytes, text_hash);
"""
_NAMES = ("segments", "snapshots", "clock")
_NEXT_IDS = 16
"""Token ids after a snapshot that tell one continuation from another."""


SegmentRow = tuple[str, str | None, str, bytes, int]
"""Name, parent, identity, token ids, bytes."""


@dataclass(frozen=True)
class Found:
    """One snapshot of the index."""

    name: str
    parent: str | None
    identity: str
    tail: bytes
    tokens: int
    ids_hash: bytes
    text_bytes: int
    text_hash: bytes
    n_bytes: int
    created: float
    used: int = 0
    hits: int = 0
    born: int = 0
    uses: int = 0
    continuations: int = 0


_COLUMNS = (
    "name, parent, identity, tail, tokens, ids_hash, text_bytes, text_hash, bytes, created, used, "
    "hits, born, uses"
)
_CONTINUATIONS = "(next IS NOT NULL) + branched"


def digests(data: bytes, ends: Iterable[int]) -> dict[int, bytes]:
    """SHA-256 of data[:end] for each end, in one pass."""
    running, at, found = hashlib.sha256(), 0, {}
    for end in sorted({end for end in ends if end <= len(data)}):
        running.update(data[at:end])
        found[end], at = running.digest(), end
    return found


class Index:
    """An open index. Methods raise sqlite3.Error."""

    def __init__(self, path: Path | None):
        """path: None keeps it in memory, where a directory cannot be written.

        Raises sqlite3.DatabaseError when the file is no index or damaged.
        """
        if path is not None and not path.exists():
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
        self._db = sqlite3.connect(":memory:" if path is None else path, timeout=5)
        try:
            (found,) = self._db.execute("PRAGMA quick_check(1)").fetchone()
            if found != "ok":  # a file that was cut can still be read, and says what nobody wrote
                raise sqlite3.DatabaseError(found)
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            self.fresh = version != SCHEMA
            if self.fresh:
                self._db.executescript(
                    "".join(f"DROP TABLE IF EXISTS {name};" for name in _NAMES)
                    + _TABLES
                    + f"PRAGMA user_version = {SCHEMA};"
                )
        except BaseException:
            self._db.close()
            raise

    def close(self) -> None:
        self._db.close()

    def prefixes(self, identity: str, text: bytes) -> list[Found]:
        """Snapshots whose text begins `text`, longest first."""
        where = "FROM snapshots WHERE identity = ? AND text_bytes"
        ends = self._db.execute(f"SELECT DISTINCT text_bytes {where} <= ?", (identity, len(text)))
        found: list[Found] = []
        for end, digest in digests(text, (row[0] for row in ends)).items():
            rows = self._db.execute(
                f"SELECT {_COLUMNS}, {_CONTINUATIONS} {where} = ? AND text_hash = ?",
                (identity, end, digest),
            )
            found += map(_found, rows)
        return sorted(found, key=lambda f: -f.tokens)

    def ids(self, snapshot: Found) -> bytes:
        """All token ids of a snapshot; empty when a segment is missing."""
        parts, parent = [snapshot.tail], snapshot.parent
        passed: set[str] = set()  # who walks in a circle is damaged, too
        while parent is not None:
            row = self._db.execute("SELECT parent, ids FROM segments WHERE name = ?", (parent,))
            found = row.fetchone()
            if found is None or parent in passed:
                return b""
            passed.add(parent)
            parent = found[0]
            parts.append(found[1])
        return b"".join(reversed(parts))

    def use(self, found: Sequence[Found], ids: bytes, hit: bool) -> None:
        """Note that a sequence of these ids came by its stored prefixes, the longest first.

        hit: it was restored from that one. Time goes on, also where nothing is found.
        """
        now = self.now() + 1
        with self._db:
            self._db.execute("UPDATE clock SET uses = ?", (now,))
            for n, snapshot in enumerate(found):
                following = ids[4 * snapshot.tokens :][: 4 * _NEXT_IDS] or None
                self._db.execute(
                    "UPDATE snapshots SET used = ?1, hits = hits + ?2, uses = uses + 1, "
                    "branched = branched OR (?3 IS NOT NULL AND next IS NOT NULL AND next != ?3), "
                    "next = coalesce(next, ?3) WHERE name = ?4",
                    (now, int(hit and n == 0), following, snapshot.name),
                )

    def now(self) -> int:
        """The number of the latest use."""
        return int(self._db.execute("SELECT uses FROM clock").fetchone()[0])

    def add(self, segments: Iterable[SegmentRow], new: Found) -> None:
        """A snapshot and its new segments."""
        self.add_segments(segments)
        with self._db:
            self._db.execute(
                f"INSERT OR REPLACE INTO snapshots({_COLUMNS}) "
                "VALUES(?,?,?,?,?,?,?,?,?,?,?,?,?,?)",
                (
                    *(new.name, new.parent, new.identity, new.tail, new.tokens, new.ids_hash),
                    *(new.text_bytes, new.text_hash, new.n_bytes, new.created),
                    *(self.now(), new.hits, new.born, new.uses),
                ),
            )

    def add_segments(self, rows: Iterable[SegmentRow]) -> None:
        with self._db:
            self._db.executemany("INSERT OR REPLACE INTO segments VALUES(?,?,?,?,?)", rows)

    def has(self, table: str, name: str) -> bool:
        query = {
            "segments": "SELECT 1 FROM segments WHERE name = ?",
            "snapshots": "SELECT 1 FROM snapshots WHERE name = ?",
        }[table]
        return self._db.execute(query, (name,)).fetchone() is not None

    def names(self, table: str) -> set[str]:
        query = {"segments": "SELECT name FROM segments", "snapshots": "SELECT name FROM snapshots"}
        return {row[0] for row in self._db.execute(query[table])}

    def remove(self, snapshots: Iterable[str], segments: Iterable[str]) -> None:
        with self._db:
            self._db.executemany("DELETE FROM snapshots WHERE name = ?", [(n,) for n in snapshots])
            self._db.executemany("DELETE FROM segments WHERE name = ?", [(n,) for n in segments])

    def all(self) -> list[Found]:
        """Every snapshot, the one used last first."""
        query = f"SELECT {_COLUMNS}, {_CONTINUATIONS} FROM snapshots"
        rows = self._db.execute(f"{query} ORDER BY used DESC, tokens DESC")
        return list(map(_found, rows))

    def n_bytes(self) -> int:
        """Of all files."""
        query = "SELECT coalesce(sum(bytes), 0) FROM "
        return sum(
            int(self._db.execute(query + table).fetchone()[0])
            for table in ("segments", "snapshots")
        )

    def tree(self) -> Forest:
        """Everything for eviction."""
        roots: dict[str, Segment] = {}
        rows = {row[0]: row for row in self._db.execute("SELECT * FROM segments")}
        segments: dict[str, Segment] = {}

        def root(identity: str) -> Segment:
            return roots.setdefault(identity, Segment(identity, b"", 0, None))

        def segment(name: str | None) -> Segment | None:
            """With all below it, which a long context has too many of for recursion."""
            missing, at = {}, name
            while at in rows and at not in segments and at not in missing:  # nor in a circle
                missing[at] = rows[at]
                at = rows[at][1]
            for own, parent, identity, ids, n_bytes in reversed(missing.values()):
                below = root(identity) if parent is None else segments.get(parent)
                if below is None:
                    break  # a segment is gone: what is beyond it is of no use
                segments[own] = Segment(own, ids, n_bytes, below)
            return segments.get(name or "")

        entries, broken = {}, []
        query = (
            "SELECT name, parent, identity, tail, tokens, bytes, used, born, uses, "
            f"{_CONTINUATIONS}, hits FROM snapshots"
        )
        for name, parent, identity, *facts in self._db.execute(query).fetchall():
            below = root(identity) if parent is None else segment(parent)
            if below is None:
                broken.append(name)
            else:
                entries[name] = Entry(name, below, *facts)
        tree = Tree(entries.values())
        for name in rows:
            segment(name)
        held = {name for name, found in segments.items() if found.holders}
        return Forest(tree, roots, entries, segments, set(rows) - held, broken)


@dataclass(frozen=True)
class Forest:
    """What an index holds, as eviction sees it."""

    tree: Tree
    roots: dict[str, Segment]
    """Of each model's tree, by its identity."""
    entries: dict[str, Entry]
    segments: dict[str, Segment]
    """Those with everything below them."""
    loose: set[str]
    """Names of segments that no snapshot needs."""
    broken: list[str]
    """Names of snapshots that lack a segment."""

    def root(self, identity: str) -> Segment:
        """Where the snapshots of a model begin."""
        return self.roots.setdefault(identity, Segment(identity, b"", 0, None))


def _found(row: tuple[object, ...]) -> Found:
    make: Callable[..., Found] = Found
    return make(*row)
