"""Does reading ahead pay? Known times on a counted clock, and the default that follows."""

import math

import pytest

from ds4py.bench.ahead import BEFORE_ROUTER, DEPTH, RATIOS, gains, made_up, recall, replay
from ds4py.experts import simulate
from ds4py.experts.options import StreamingOptions
from ds4py.experts.trace import Trace, reuse

LAYERS, CHOSEN = 10, 6


def small(reuse: float, guessed: float, n_steps: int = 16) -> Trace:
    return made_up(n_steps, reuse, guessed, LAYERS, n_experts=128, hashed=1)


def test_times_by_hand() -> None:
    """Nothing is used twice: six reads a layer, four at a time, in two rounds."""
    trace, rounds = small(0.0, 1.0), math.ceil(CHOSEN / DEPTH)
    for n, step in enumerate(trace.steps):  # uses experts that no step before it used
        for ids in (*step.chosen.values(), *step.foreseen.values()):
            ids[:] = [[(CHOSEN * n + i) % 128 for i in range(CHOSEN)]]
    slots = LAYERS * CHOSEN
    assert replay(trace, slots, "off", 0.0, 1.0).token_s == LAYERS * rounds * DEPTH
    assert replay(trace, slots, "off", 50.0, 1.0).token_s == pytest.approx(
        LAYERS * rounds * DEPTH + 50
    )
    assert replay(trace, slots, "off", 50.0, 1.0).reads == LAYERS * CHOSEN
    # Guessed a layer ahead, they are behind computing that takes longer; all but the first layer's.
    hidden = replay(trace, slots, "router", 1000.0, 1.0)
    assert hidden.reads == LAYERS * CHOSEN
    assert 1000 <= hidden.token_s <= 1000 + rounds * DEPTH
    assert recall(trace) == 1.0


@pytest.mark.parametrize("prefetch", ["off", "hash", "router"])
def test_reads_are_the_simulators(prefetch: str) -> None:
    """Every promise is read when nothing else is in the way."""
    trace = small(0.4, 0.7)
    for slots in (LAYERS * CHOSEN, 3 * LAYERS * CHOSEN):
        counts = simulate.total(simulate.replay(trace, slots, "lru", prefetch))
        read = counts.misses + counts.prefetched + counts.wasted
        found = replay(trace, slots, prefetch, 1e6, 1.0)
        assert found.reads * len(trace.steps) == read


@pytest.mark.parametrize("ratio", RATIOS)
def test_what_is_known_in_time_is_read_behind_computing(ratio: float) -> None:
    """All layers' experts are known from the token, none is used again: a token takes the longer of
    computing and reading, and what nothing can hide: the first layer's reads, and the computing
    behind the last one's. Without reading ahead it takes half as long again, or twice."""
    trace = made_up(24, 0.0, 1.0, LAYERS, n_experts=128, hashed=LAYERS)
    for slots in (LAYERS * CHOSEN, 2 * LAYERS * CHOSEN):
        reading = replay(trace, slots, "hash", 0.0, 1.0).token_s
        computing = ratio * reading
        serial = (reading + (1 - BEFORE_ROUTER) * computing) / LAYERS
        most = max(computing, reading)
        assert replay(trace, slots, "hash", computing, 1.0).token_s <= 1.10 * most + serial
        assert replay(trace, slots, "off", computing, 1.0).token_s > 1.3 * most


def test_reading_ahead_stays_below_its_bound() -> None:
    for found in gains(small(0.3, 0.8), [LAYERS * CHOSEN, 4 * LAYERS * CHOSEN]):
        assert found.speed <= found.bound * 1.001


def test_why_the_routers_guesses_are_no_default() -> None:
    """They pay where four of five are right, or where there is more to compute than to read. Where
    reading takes the time, three of five are too few; nobody has measured the released models'."""
    slots = [2 * LAYERS * CHOSEN]
    good, poor = ({g.ratio: g.speed for g in gains(small(0.27, r, 40), slots)} for r in (0.85, 0.5))
    assert all(speed > 1.03 for speed in good.values())
    assert poor[4.0] > 1 and poor[0.25] < 1
    assert StreamingOptions().prefetch == "hash"


def test_a_made_up_trace_is_what_it_says() -> None:
    trace = made_up(60, 0.4, 0.7, LAYERS, n_experts=128, hashed=1)
    assert recall(trace) == pytest.approx(0.7, abs=0.02)
    shares = [reuse(trace.decoded(layer)) for layer in range(1, LAYERS)]
    assert sum(shares) / len(shares) == pytest.approx(0.4 + 0.6 * 6 / 128, abs=0.03)
