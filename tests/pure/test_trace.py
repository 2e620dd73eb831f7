"""The rule of eviction on made-up agents' days: it reads less anew than the rules it replaced."""

from collections.abc import Sequence

import pytest

from ds4py.bench import kv, trace

FLASH = (3514.25, 9_000_000)
TINY = (132.5, 180_000)


def shares(
    names: Sequence[str], budget: int, model: tuple[float, int], requests: list[trace.Request]
) -> dict[str, float]:
    token_bytes, frontier_bytes = model
    n_bytes = int(budget * token_bytes)
    return {
        name: trace.recomputed(requests, name, n_bytes, token_bytes, frontier_bytes)
        for name in names
    }


@pytest.mark.parametrize("budget", [30_000, 60_000, 120_000])
def test_less_is_read_anew(budget: int) -> None:
    found = shares(("lru", "ds4 score", "ours"), budget, FLASH, trace.make_trace(150, seed=5))
    assert 0 < found["ours"] < min(found["lru"], found["ds4 score"]), found


def test_room_for_everything_reads_only_what_is_new() -> None:
    requests = trace.make_trace(40, seed=2)
    found = shares(("lru", "ours", "oracle"), 10_000_000, TINY, requests)
    assert found["lru"] == found["ours"] == found["oracle"]
    replay = trace.Replay(trace.lru, 1 << 50, *TINY)
    for request in requests:
        replay.serve(request)
    new = 0
    saved: list[bytes] = []
    for request in requests:
        best = max((len(s) for s in saved if request.prompt.startswith(s)), default=0)
        new += (len(request.prompt) - best) // 4
        saved += [request.after[: 4 * end] for end in request.saved]
    assert replay.read == new


@pytest.mark.long
@pytest.mark.parametrize("model", [FLASH, TINY], ids=["flash", "tiny"])
@pytest.mark.parametrize("branches", [4, 8, 16])
def test_at_every_budget_and_on_other_days(model: tuple[float, int], branches: int) -> None:
    """Less than LRU and than ds4's score at every budget, unless nothing has to go at all."""
    for seed in (11, 12):
        requests = trace.make_trace(250, seed, branches)
        new = shares(("lru",), 10_000_000, model, requests)["lru"]
        for budget in (20_000, *kv.BUDGETS):
            found = shares(("lru", "ds4 score", "ours"), budget, model, requests)
            least = min(found["lru"], found["ds4 score"])
            assert found["ours"] < least or found["ours"] == least == new, (seed, budget, found)
