"""Which snapshot of a full store is worth least: marginal value in the tree of prefixes.

A snapshot x saves the tokens between it and its nearest stored ancestor, to whoever comes back; it
costs the bytes nobody else needs. Two facts of agents' traffic decide the order:

- The snapshot at the end of turn 5 is useless once that of turn 6 is stored, though it was used
  once and the fresh one never: x is *superseded* when a stored snapshot extends it and only one
  continuation of it was ever seen. Superseded ones go first, dearest bytes first.
- A shared prompt has many continuations, is never superseded, and counts as used whenever one of
  its branches is: it outlives them.

Among the rest the least (tokens saved) / (bytes * age) goes. Age counts uses of the store, not
seconds: no clock can turn it round. `ds4 bench kv` replays a trace against other rules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field


@dataclass(eq=False)
class Segment:
    """A fixed number of tokens' rows, shared by all snapshots beyond it; without parent: the root
    of one model's tree, which has no tokens."""

    name: str
    ids: bytes
    """Its token ids."""
    n_bytes: int
    parent: Segment | None
    holders: int = 0
    """Snapshots anywhere beyond it."""
    entries: list[Entry] = field(default_factory=list)
    """Snapshots that end before its next segment does."""
    children: list[Segment] = field(default_factory=list)
    """Those somebody holds."""


@dataclass(eq=False)
class Entry:
    """One snapshot as eviction sees it."""

    name: str
    segment: Segment
    """The last whole segment below it, or the root."""
    tail: bytes
    """The token ids after that."""
    tokens: int
    """In all."""
    own_bytes: int
    """Of its own file."""
    used: int
    """Number of the use of the store that last needed it or a branch of it."""
    continuations: int = 0
    """Distinct ones ever seen; 2 stands for many."""
    hits: int = 0
    """Uses of itself."""


class Tree:
    """Snapshots and the segments below them. Segments that nobody holds are not in it."""

    def __init__(self, entries: Iterable[Entry] = ()):
        self.entries: set[Entry] = set()
        self.n_bytes = 0
        for entry in entries:
            self.add(entry)

    def add(self, entry: Entry) -> None:
        self.entries.add(entry)
        self.n_bytes += entry.own_bytes
        entry.segment.entries.append(entry)
        for segment in _up(entry.segment):
            segment.holders += 1
            if segment.holders == 1 and segment.parent is not None:
                segment.parent.children.append(segment)
                self.n_bytes += segment.n_bytes

    def remove(self, entry: Entry) -> list[Segment]:
        """Take an entry out; the segments that nobody holds any more."""
        self.entries.remove(entry)
        self.n_bytes -= entry.own_bytes
        entry.segment.entries.remove(entry)
        freed = []
        for segment in _up(entry.segment):
            segment.holders -= 1
            if not segment.holders and segment.parent is not None:
                segment.parent.children.remove(segment)
                self.n_bytes -= segment.n_bytes
                freed.append(segment)
        return freed

    def exclusive_bytes(self, entry: Entry) -> int:
        """What removing it would free."""
        total = entry.own_bytes
        for segment in _up(entry.segment):
            if segment.holders > 1:
                break
            total += segment.n_bytes
        return total

    def extended(self, entry: Entry) -> bool:
        """Whether a stored snapshot continues it."""
        beside = (e.tail for e in entry.segment.entries if e.tokens > entry.tokens)
        beyond = (child.ids for child in entry.segment.children)
        return any(ids.startswith(entry.tail) for ids in (*beside, *beyond))

    def superseded(self, entry: Entry) -> bool:
        """Whether a stored snapshot continues it and nothing else ever did."""
        return entry.continuations < 2 and self.extended(entry)

    def ancestors(self, entry: Entry) -> Iterator[Entry]:
        """The stored snapshots that it continues, of each segment the longest first."""
        ids, shorter = entry.tail, entry.tokens
        for segment in _up(entry.segment):
            found = [e for e in segment.entries if e.tokens < shorter and ids.startswith(e.tail)]
            yield from sorted(found, key=lambda e: -e.tokens)
            ids = segment.ids

    def victim(self, now: int, kept: Iterable[Entry] = ()) -> Entry | None:
        """The one worth least, None when all are `kept`. now: number of the current use."""

        def worth(entry: Entry) -> tuple[bool, float, int]:
            saved = entry.tokens - next((e.tokens for e in self.ancestors(entry)), 0)
            cost = self.exclusive_bytes(entry) * (1 + now - entry.used)
            return not self.superseded(entry), saved / cost, entry.used

        return min(self.entries.difference(kept), key=worth, default=None)


Policy = Callable[[Tree, int, Iterable[Entry]], Entry | None]
"""(tree, number of the current use, entries to keep) -> the entry to remove."""


def _up(segment: Segment | None) -> Iterator[Segment]:
    while segment is not None:
        yield segment
        segment = segment.parent
