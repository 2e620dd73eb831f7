"""What a full store keeps: the snapshots that are expected to save most, in the tree of prefixes.

A snapshot x saves the tokens between it and its nearest stored ancestor, to whoever comes back; it
costs the bytes nobody else needs. Three facts of agents' traffic decide:

- The snapshot at the end of turn 5 is useless once that of turn 6 is stored, though it was used
  once and the fresh one never: x is *superseded* when a stored snapshot extends it and only one
  continuation of it was ever seen. Superseded ones go first, and hand on their history of uses.
- A shared prompt has many continuations, is never superseded, and counts as used whenever one of
  its branches is: it outlives them.
- A conversation comes back about as often as it did, until it is given up: `rate` tells from its
  uses and from how long it has been silent.

Among the rest the least (tokens saved) * rate / bytes goes. A new snapshot for which more would
have to go than it is worth itself is not taken in: a store that holds three conversations and is
asked for eight by turns would else never have the right one. Time counts uses of the store, not
seconds: no clock can turn it round. `ds4 bench kv` replays a trace against other rules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

FIRST_SPAN = 8
"""Uses of the store in which a snapshot without history is expected to come back once."""
GIVEN_UP = 0.2
"""How likely a conversation ends with a use, before anything else is known."""


class Known(Protocol):
    """A snapshot's history."""

    @property
    def used(self) -> int:
        """Number of the use of the store that last needed it or a branch of it."""
        ...

    @property
    def born(self) -> int:
        """Number of the use with which it, or what it goes on from, began."""
        ...

    @property
    def uses(self) -> int:
        """How often that was used since."""
        ...

    @property
    def continuations(self) -> int:
        """Distinct ones ever seen; 2 stands for many."""
        ...


def rate(known: Known, now: int) -> float:
    """Expected uses per use of the store.

    Uses come at random at a rate of their own for every conversation until one of them is the last
    (the BG/NBD model: Fader, Hardie, Lee 2005): the rate so far, times the chance that a silence
    this long is not the end. now: number of the current use.
    """
    span, age = FIRST_SPAN + known.used - known.born, FIRST_SPAN + now - known.born
    silence = min((1 + known.uses) * math.log(age / span), 500)  # beyond it a float overflows
    return (1 + known.uses) / age / (1 + GIVEN_UP * math.expm1(silence))


def history(parent: Known | None, now: int) -> tuple[int, int]:
    """`born` and `uses` of a new snapshot: those of what it goes on from, unless others do too."""
    alone = parent is not None and parent.continuations < 2
    return (parent.born, parent.uses) if parent is not None and alone else (now, 0)


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
    born: int
    uses: int = 0
    continuations: int = 0
    hits: int = 0
    """Uses of itself, nothing beyond it."""


class Worth(NamedTuple):
    """Of an entry, under some rule."""

    order: tuple[float, ...]
    """The least goes first."""
    value: float
    """What is lost with it, to be compared with what is won."""


Policy = Callable[["Tree", int], Callable[[Entry], Worth]]
"""(tree, number of the current use) -> the worth of its entries as the tree then is."""


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

    def saved(self, entry: Entry) -> int:
        """Tokens that are read anew without it."""
        return entry.tokens - next((e.tokens for e in self.ancestors(entry)), 0)

    def room_for(
        self, new: Entry, n_bytes: int, now: int, policy: Policy | None = None
    ) -> list[Entry] | None:
        """The entries to remove so that the tree, which holds `new`, takes `n_bytes` at most.

        None: `new` is worth less than they are, or too large. Leaves the tree as it is.
        policy: None is `expected`.
        """
        worth, victims, lost = (policy or expected)(self, now), [], 0.0
        won = worth(new).value
        while self.n_bytes > n_bytes and len(self.entries) > 1:
            found = {entry: worth(entry) for entry in self.entries if entry is not new}
            victim = min(found, key=lambda entry: (found[entry].order, entry.name))
            lost += found[victim].value
            self.remove(victim)
            victims.append(victim)
        fits = self.n_bytes <= n_bytes and lost <= won
        for victim in victims:
            self.add(victim)
        return victims if fits else None


def expected(tree: Tree, now: int) -> Callable[[Entry], Worth]:
    """The tokens that an entry is expected to save, superseded ones none."""

    def worth(entry: Entry) -> Worth:
        value = tree.saved(entry) * rate(entry, now)
        left = not tree.superseded(entry)
        return Worth((left, value / tree.exclusive_bytes(entry), entry.used), value * left)

    return worth


def _up(segment: Segment | None) -> Iterator[Segment]:
    while segment is not None:
        yield segment
        segment = segment.parent
