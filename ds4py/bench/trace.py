"""Replays a made-up agents' day against rules of eviction: how much of the prompts is read anew.

The trace: conversations that all begin with one system prompt of 2,000 tokens, a few of them at a
time, picked by Zipf's law. Each request adds a message or a tool's result and a reply to its
conversation; now and then one is given up for a new one. Side requests (titles, sub-agents) come in
between, and nobody returns to them. After every request the end of the conversation is saved, at
first the system prompt too. All rules evict from the same store: shared segments, one frontier a
snapshot.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

from ds4py.cache.evict import Entry, Policy, Segment, Tree, Worth, expected, history
from ds4py.cache.store import SEGMENT

SYSTEM_TOKENS = 2000
BRANCHES = 8
ZIPF = 1.1
SIDE = 0.2
"""Share of side requests."""
GIVEN_UP = 0.06
"""How often a request opens a new conversation in the place of its old one."""
SECONDS = 60.0
"""Between two requests, for rules that look at a clock."""
HALF_LIFE = 6 * 3600.0
_ID = 4
_STEP = SEGMENT * _ID


@dataclass(frozen=True)
class Request:
    """Token ids as bytes, and the lengths to be saved afterwards."""

    prompt: bytes
    after: bytes
    """The prompt and its reply."""
    saved: tuple[int, ...]


def make_trace(n_requests: int, seed: int, branches: int = BRANCHES) -> list[Request]:
    """The requests of one day."""
    rng = random.Random(seed)

    def tokens(low: int, high: int) -> bytes:
        return rng.randbytes(_ID * rng.randint(low, high))

    system = tokens(SYSTEM_TOKENS, SYSTEM_TOKENS)
    weights = [1 / (n + 1) ** ZIPF for n in range(branches)]
    talks, requests = [system] * branches, []
    for _ in range(n_requests):
        if rng.random() < SIDE:
            prompt = tokens(200, 800)
            after = prompt + tokens(10, 60)
            requests.append(Request(prompt, after, (len(after) // _ID,)))
            continue
        branch = rng.choices(range(branches), weights)[0]
        before = system if rng.random() < GIVEN_UP else talks[branch]
        prompt = before + (tokens(30, 300) if rng.random() < 0.5 else tokens(300, 2500))
        talks[branch] = after = prompt + tokens(50, 600)
        requests.append(Request(prompt, after, (SYSTEM_TOKENS, len(after) // _ID)))
    return requests


class Replay:
    """One store under one rule."""

    def __init__(
        self, policy: Policy, budget: int, token_bytes: float, frontier_bytes: int
    ) -> None:
        self._policy, self._budget = policy, budget
        self._token_bytes, self._frontier_bytes = token_bytes, frontier_bytes
        self.tree, self._root = Tree(), Segment("", b"", 0, None)
        self._segments: dict[tuple[Segment, bytes], Segment] = {}
        self._seen: dict[str, set[bytes]] = {}
        self.now = self.prompts = self.read = 0

    def serve(self, request: Request) -> None:
        """Find the longest prefix, then save what the request asks for."""
        self.now += 1
        found = self._stored(request.prompt)
        reused = found[0].tokens if found else 0
        self.prompts += len(request.prompt) // _ID
        self.read += len(request.prompt) // _ID - reused
        for n, entry in enumerate(found):
            entry.used, entry.hits = self.now, entry.hits + (n == 0)
            entry.uses += 1
        for end in request.saved:
            self._save(request.after[: end * _ID])

    def _stored(self, ids: bytes) -> list[Entry]:
        """Stored prefixes, the longest first."""
        found: list[Entry] = []
        segment: Segment | None = self._root
        at = 0
        while segment is not None:
            rest = ids[at : at + _STEP]
            here = [e for e in segment.entries if rest.startswith(e.tail)]
            found += sorted(here, key=lambda e: e.tokens)
            segment, at = self._segments.get((segment, rest)), at + _STEP
        return found[::-1]

    def _save(self, ids: bytes) -> None:
        segment, at = self._root, 0
        while at + _STEP <= len(ids):
            part = ids[at : at + _STEP]
            below = self._segments.get((segment, part))
            if below is None:
                below = Segment("", part, int(self._token_bytes * SEGMENT), segment)
                self._segments[segment, part] = below
            segment, at = below, at + _STEP
        tail = ids[at:]
        if any(e.tail == tail for e in segment.entries):
            return
        own = self._frontier_bytes + int(self._token_bytes * len(tail) / _ID)
        ancestors = self._stored(ids)
        for entry in ancestors:
            seen = self._seen.setdefault(entry.name, set())
            seen.add(ids[entry.tokens * _ID :][:64])
            entry.continuations = min(len(seen), 2)
        born, uses = history(ancestors[0] if ancestors else None, self.now)
        new = Entry(_name(ids), segment, tail, len(ids) // _ID, own, self.now, born, uses)
        self.tree.add(new)
        victims = self.tree.room_for(new, self._budget, self.now, self._policy)
        for victim in [new] if victims is None else victims:
            for gone in self.tree.remove(victim):
                assert gone.parent is not None
                del self._segments[gone.parent, gone.ids]


def lru(tree: Tree, now: int) -> Callable[[Entry], Worth]:
    """The one that was unused for longest goes, whatever comes."""
    return lambda entry: Worth((entry.used,), 0)


def ds4_score(token_bytes: float, frontier_bytes: int) -> Policy:
    """antirez/ds4's: (hits, halved every six hours, + 1) * tokens / size of its file."""

    def policy(tree: Tree, now: int) -> Callable[[Entry], Worth]:
        def worth(entry: Entry) -> Worth:
            hits = entry.hits * 2 ** (-(now - entry.used) * SECONDS / HALF_LIFE)
            size = entry.tokens * token_bytes + frontier_bytes  # its files share nothing
            score = ((hits if hits >= 0.01 else 0) + 1) * entry.tokens / size
            return Worth((score, entry.used), 0)

        return worth

    return policy


def oracle(requests: list[Request]) -> Policy:
    """Knows the requests to come: tokens saved at the next use, per byte and use until then."""
    saved: dict[bytes, set[int]] = {}  # by first ids: lengths that some request saved
    for request in requests:
        saved.setdefault(request.after[:64], set()).update(request.saved)
    uses: dict[str, list[int]] = {}
    for n, request in enumerate(requests, 1):
        for end in saved[request.after[:64]]:
            if end * _ID <= len(request.prompt):
                uses.setdefault(_name(request.prompt[: end * _ID]), []).append(n)

    def policy(tree: Tree, now: int) -> Callable[[Entry], Worth]:
        def next_use(entry: Entry) -> int | None:
            times = uses.get(entry.name, [])
            at = bisect_right(times, now)
            return times[at] if at < len(times) else None

        needed: dict[int, int] = {}
        coming = {entry: next_use(entry) for entry in tree.entries}
        for entry, when in coming.items():
            if when is not None:
                needed[when] = max(needed.get(when, 0), entry.tokens)

        def worth(entry: Entry) -> Worth:
            when = coming[entry]
            if when is None or needed[when] > entry.tokens:
                return Worth((0.0 if when is not None else -1.0,), 0)
            value = tree.saved(entry) / (when - now)
            return Worth((value / tree.exclusive_bytes(entry),), value)

        return worth

    return policy


def _name(ids: bytes) -> str:
    """Tells sequences apart: their ids are random."""
    return ids[-32:].hex()


POLICIES: dict[str, Callable[[list[Request], float, int], Policy]] = {
    "lru": lambda requests, token_bytes, frontier_bytes: lru,
    "ds4 score": lambda requests, token_bytes, frontier: ds4_score(token_bytes, frontier),
    "ours": lambda requests, token_bytes, frontier_bytes: expected,
    "oracle": lambda requests, token_bytes, frontier_bytes: oracle(requests),
}


def recomputed(
    requests: list[Request], name: str, budget: int, token_bytes: float, frontier_bytes: int
) -> float:
    """Share of the prompts' tokens that is read anew under a rule and a budget in bytes."""
    policy = POLICIES[name](requests, token_bytes, frontier_bytes)
    replay = Replay(policy, budget, token_bytes, frontier_bytes)
    for request in requests:
        replay.serve(request)
    return replay.read / replay.prompts
