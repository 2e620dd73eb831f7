"""Checkpoints are few, ordered, and never far from where a session may want to return."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ds4py.cache.state import Frontier
from ds4py.engine.checkpoints import MOST, Checkpoints


def frontier(position: int) -> Frontier:
    return Frontier(position, np.zeros(1000, np.uint8), {}, np.zeros(0))


@given(st.lists(st.integers(1, 4), min_size=1, max_size=200))
def test_bounded_and_best(steps: list[int]) -> None:
    kept, position, taken = Checkpoints(), 0, []
    for step in steps:
        position += 128 * step
        kept.add(frontier(position))
        taken.append(position)
    found = [f.position for p in range(0, position + 1, 128) if (f := kept.best(p))]
    assert found == sorted(found)
    assert len(set(found)) <= MOST
    best = kept.best(position)
    assert best is not None and best.position == position
    kept.forget_after(position - 1)
    last = kept.best(position)
    assert last is None or last.position < position


def test_old_ones_thin_out_evenly() -> None:
    kept = Checkpoints()
    for i in range(1, 1001):
        kept.add(frontier(128 * i))
    end = 128_000
    for back in (1, 1000, 10_000, 60_000, 100_000):  # going back costs a bounded share
        target = end - back
        f = kept.best(target)
        lost = target - (f.position if f else 0)
        assert lost <= max(0.5 * back, 2 * 128), (back, lost)


def test_turns_stay_longer_and_bytes_are_bounded() -> None:
    kept = Checkpoints(most_bytes=9500)
    for i in range(1, 201):
        kept.add(frontier(128 * i), turn=i == 120)
        assert kept.n_bytes <= 9500
    assert [f.position for f in kept.turns()] == [128 * 120]
    assert kept.up_to(128 * 150).best(10**6) is kept.best(128 * 150)
    one = Checkpoints(most_bytes=10)
    one.add(frontier(128))
    one.add(frontier(256))
    assert [f.position for f in one.frontiers()] == [256]
    one.add(frontier(256), turn=True)
    assert [f.position for f in one.turns()] == [256]
