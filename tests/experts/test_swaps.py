"""Cache-aware routing keeps within its guards, whatever the scores."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ds4py.experts.swaps import CANDIDATES, LEAST_MASS, MOST, PROTECTED, BoundedSwaps, Ranked

E, K = 64, 6


def routed(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    score = rng.gamma(2.0, 1.0, E).astype(np.float32)
    bias = rng.normal(0, 0.1, E).astype(np.float32)
    return score, bias, np.argsort(-(score + bias), kind="stable")[:K]


@given(st.integers(0, 1000), st.floats(0, 1), st.sets(st.integers(0, E - 1)))
def test_guards(seed: int, regret: float, present: set[int]) -> None:
    score, bias, ids = routed(seed)
    ranked = Ranked.of(score, bias)
    assert ranked.ids[:K].tolist() == ids.tolist()
    chosen, displaced = BoundedSwaps(regret).choose(0, ranked, K, present.__contains__)
    assert len(set(chosen.tolist())) == K
    assert chosen[:PROTECTED].tolist() == ids[:PROTECTED].tolist()
    swapped = np.flatnonzero(chosen != ids)
    assert len(swapped) <= MOST and sorted(ids[swapped]) == sorted(displaced)
    assert not set(displaced) & present and set(chosen[swapped].tolist()) <= present
    assert score[chosen].sum() >= LEAST_MASS * score[ids].sum() - 1e-4
    q = score + bias
    rank = np.argsort(np.argsort(-q, kind="stable"))
    for place in swapped:
        assert rank[chosen[place]] < CANDIDATES
        assert q[ids[place]] - q[chosen[place]] <= regret * (q.max() - q.min()) + 1e-5


def test_nothing_to_swap() -> None:
    for seed in range(50):
        score, bias, ids = routed(seed)
        for regret, present in ((1e-9, range(E)), (1.0, ()), (1.0, range(E))):
            swaps = BoundedSwaps(regret)
            ranked = Ranked.of(score, bias)
            chosen, displaced = swaps.choose(0, ranked, K, set(present).__contains__)
            assert chosen.tolist() == ids.tolist() and displaced == []
            assert swaps.counts.swapped == 0 and swaps.counts.kept_mass == 1.0


def test_what_is_absent_gives_way() -> None:
    score = np.linspace(2.0, 1.9, E, dtype=np.float32)
    swaps, ranked = BoundedSwaps(1.0), Ranked.of(score, np.zeros(E, np.float32))
    chosen, displaced = swaps.choose(0, ranked, K, {8, 20, 30}.__contains__)
    assert chosen.tolist() == [0, 1, 2, 3, 20, 8] and sorted(displaced) == [4, 5]
    assert swaps.counts.swapped == 2 and swaps.counts.slots == K
