"""What eviction expects of snapshots, and that asking it changes nothing."""

import random

from hypothesis import given
from hypothesis import strategies as st

from ds4py.cache.evict import Entry, Segment, Tree, history, rate

COUNTS = st.integers(0, 10**6)


def entry(tokens: int, own_bytes: int, used: int = 0, born: int = 0, uses: int = 0) -> Entry:
    root = Segment("", b"", 0, None)
    return Entry(str(tokens), root, bytes(4 * tokens), tokens, own_bytes, used, born, uses)


@given(born=COUNTS, span=COUNTS, silence=COUNTS, uses=COUNTS)
def test_a_rate_falls_with_silence_and_is_at_most_what_was_seen(
    born: int, span: int, silence: int, uses: int
) -> None:
    known = entry(1, 1, born + span, born, min(uses, span))
    now, later = (rate(known, known.used + n) for n in (silence, silence + 1))
    assert 0 < later <= now <= (1 + known.uses) / (8 + span + silence)


def test_rates_tell_a_habit_from_a_stranger_and_an_old_friend_from_one_who_left() -> None:
    stranger, habit, left = entry(1, 1, 100, 100), entry(1, 1, 95, 0, 20), entry(1, 1, 40, 0, 20)
    assert rate(left, 100) < rate(stranger, 100) < rate(habit, 100)
    seldom = entry(1, 1, 40, 0, 1)
    assert rate(left, 100) < rate(seldom, 100)  # the same silence says less of it


def test_a_history_passes_on_where_nobody_else_continues() -> None:
    parent = entry(1, 1, 9, 3, 4)
    assert history(None, 12) == (12, 0) and history(parent, 12) == (3, 4)
    parent.continuations = 2
    assert history(parent, 12) == (12, 0)


def chain(tree: Tree, rng: random.Random, root: Segment, n_segments: int) -> list[Entry]:
    """A conversation's snapshots, one after each segment."""
    below, made = root, []
    for n in range(1, n_segments + 1):
        known = [child for child in below.children if rng.random() < 0.3]
        below = known[0] if known else Segment("s", rng.randbytes(8), 100, below)
        made.append(Entry(rng.randbytes(4).hex(), below, b"", n, 30, n, n))
        tree.add(made[-1])
    return made


@given(st.integers(0, 10**6), st.integers(0, 4000))
def test_room_is_told_and_not_made(seed: int, n_bytes: int) -> None:
    rng, tree, root = random.Random(seed), Tree(), Segment("", b"", 0, None)
    entries = [e for _ in range(5) for e in chain(tree, rng, root, rng.randint(1, 6))]
    for one in entries:
        one.continuations, one.uses = rng.randint(0, 2), rng.randint(0, 9)
    new, before = entries[-1], (set(tree.entries), tree.n_bytes)
    freed = {e: tree.exclusive_bytes(e) for e in entries}
    victims = tree.room_for(new, n_bytes, now=10)
    assert (set(tree.entries), tree.n_bytes) == before
    assert {e: tree.exclusive_bytes(e) for e in entries} == freed
    if victims is not None:
        assert new not in victims
        for victim in victims:
            tree.remove(victim)
        assert tree.n_bytes <= n_bytes
    elif n_bytes >= tree.n_bytes:
        raise AssertionError("it fits as it is")


def test_what_is_worth_less_than_it_costs_is_not_taken_in() -> None:
    habit, stranger = entry(1000, 100, 50, 0, 25), entry(900, 100, 51, 51)
    tree = Tree([habit, stranger])
    assert tree.room_for(stranger, 150, now=51) is None
    assert tree.room_for(stranger, 150, now=200) == [habit]
    assert tree.room_for(stranger, 50, now=200) is None  # too large, whatever goes
