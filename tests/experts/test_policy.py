"""Who has which slot: invariants under any sequence of requests, and known counts."""

import math
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds4py.errors import InputError, OptionsError
from ds4py.experts import simulate
from ds4py.experts.policy import Belady, Decayed, Key, Policy, Residency, online_policy
from ds4py.experts.swaps import BoundedSwaps
from ds4py.experts.trace import (
    Candidates,
    Recorder,
    Step,
    Trace,
    TraceFacts,
    Writer,
    read,
    reuse,
)
from tests.experts.models import LEAST, prompt, streamed

LAYERS, E, K = 4, 10, 3


def markov(n: int, stay: float, seed: int = 0, k: int = K, layers: int = LAYERS) -> Trace:
    """Decoding steps in which every chosen expert stays with probability `stay`."""
    rng, facts = random.Random(seed), TraceFacts("made up", layers, (), E, k)
    sets = [rng.sample(range(E), k) for _ in range(layers)]
    steps = []
    for _ in range(n):
        for layer in range(layers):
            kept = [e for e in sets[layer] if rng.random() < stay]
            rest = [e for e in range(E) if e not in kept]
            sets[layer] = kept + rng.sample(rest, k - len(kept))
        chosen = {i: np.array([sets[i]], np.uint16) for i in range(layers)}
        steps.append(Step(1, True, chosen))
    return Trace(facts, steps)


request = st.tuples(
    st.sampled_from(["use", "keep few", "promise", "offer", "withdraw", "rebuild"]),
    st.integers(0, LAYERS - 1),
    st.lists(st.integers(0, E - 1), min_size=1, max_size=K, unique=True),
)


@given(
    st.lists(request, max_size=60),
    st.integers(LAYERS * K, LAYERS * E + 3),
    st.sampled_from(["lru", "decayed"]),
)
def test_invariants(requests: list[tuple[str, int, list[int]]], n_slots: int, name: str) -> None:
    residency = Residency(n_slots, range(LAYERS), K, online_policy(name))
    for now, (what, layer, experts) in enumerate(requests):
        if what == "use":
            placed = residency.use(layer, sorted(experts), now)
            assert sorted(placed.slots) == sorted(experts) and placed.outside == []
            assert set(placed.missing) <= set(experts)
        elif what == "keep few":
            placed = residency.use(layer, range(E), now, keep=experts)
            assert set(experts) <= set(placed.slots)
            assert sorted([*placed.slots, *placed.outside]) == list(range(E))
        elif what == "promise":
            missing = residency.promise(layer, experts, now)
            assert set(missing) <= set(residency.experts_of(layer))
        elif what == "offer":
            before = set(residency.slot_of)
            residency.offer(Key(layer, experts[0]))
            assert before <= set(residency.slot_of)
        elif what == "withdraw":
            residency.withdraw()
        else:
            held = {slot: key for key, slot in residency.slot_of.items()}
            gone = {slot: key for slot, key in held.items() if key.expert not in experts}
            residency.rebuild(gone)
            assert set(residency.slot_of) == set(gone.values())
        slots = list(residency.slot_of.values())
        assert len(set(slots)) == len(slots) and all(0 <= s < n_slots for s in slots)
        by_layer = {
            n: {key.expert for key in residency.slot_of if key.layer == n} for n in range(LAYERS)
        }
        assert all(set(residency.experts_of(n)) == by_layer[n] for n in range(LAYERS))
    for layer in range(LAYERS):  # and every layer still gets its minimum
        placed = residency.use(layer, range(K), 10_000)
        assert sorted(placed.slots) == list(range(K))


def test_promised_records_stay_until_their_layer_runs() -> None:
    residency = Residency(LAYERS * K, range(LAYERS), K, online_policy("lru"))
    for layer in (3, 2, 1, 0):
        residency.use(layer, [0, 1, 2], 1)
    assert residency.promise(3, [4, 5], 2) == [4, 5]
    for layer in range(3):
        residency.use(layer, [5, 6, 7], 2)
    placed = residency.use(3, [4, 5, 6], 2)
    assert placed.missing == [6]
    assert residency.counts[3].prefetched == 2


def test_the_records_of_the_running_layer_are_not_promised_away() -> None:
    residency = Residency(LAYERS * K + 2, range(LAYERS), K, Decayed())
    for layer in range(LAYERS):
        residency.use(layer, [0, 1, 2], 1)
    placed = residency.use(0, [3, 4, 5], 2)
    residency.promise(1, [7, 8, 9], 2)
    assert all(residency.slot_of[Key(0, e)] == s for e, s in placed.slots.items())


@pytest.mark.parametrize("stay", [0.1, 0.27, 0.5, 0.9])
def test_a_cache_of_the_last_sets_misses_exactly_what_is_not_reused(stay: float) -> None:
    """K slots per layer: fetches per token are K (1 - EOR), to the integer."""
    trace = markov(400, stay)
    counts = simulate.replay(trace, LAYERS * K, "lru")
    for layer in range(LAYERS):
        sets = trace.decoded(layer)
        expected = K + K * (len(sets) - 1) * (1 - reuse(sets))
        assert counts[layer].misses == round(expected)
        assert math.isclose(expected, round(expected), abs_tol=1e-6)


def test_belady_is_the_bound() -> None:
    for seed in range(2):
        trace = markov(200, 0.4, seed)
        for n_slots in (12, 16, 24, 36):
            missed = {
                p: simulate.total(simulate.replay(trace, n_slots, p)).misses
                for p in simulate.POLICIES
            }
            assert missed["belady"] <= min(missed["lru"], missed["decayed"])
        assert missed["belady"] < missed["lru"]


def test_time_shuffled_tokens_are_reused_less() -> None:
    trace = markov(500, 0.6, seed=2)
    shuffled = Trace(trace.facts, random.Random(1).sample(trace.steps, len(trace.steps)))
    assert reuse(trace.decoded(0)) > 0.6
    assert abs(reuse(shuffled.decoded(0)) - K / E) < 0.05
    assert reuse(trace.decoded(0), 8) < reuse(trace.decoded(0), 2) < reuse(trace.decoded(0))


def test_decayed_counts_halve() -> None:
    """Scores in step 0's terms keep their order as time passes."""
    policy, a, b = Decayed(half_life=10), Key(0, 0), Key(0, 1)
    for now in (1, 2, 3):
        frequent = policy.score(a, now)
    assert policy.score(b, 4) < frequent
    assert policy.score(b, 40) > frequent  # long after, one use weighs more than three old ones
    assert math.isclose(2 ** (policy.score(b, 40) - 4), 2 + 2**-3.6, rel_tol=1e-9)


def test_belady_looks_ahead() -> None:
    policy: Policy = Belady({Key(0, 0): [1, 5, 9], Key(0, 1): [2]})
    assert policy.score(Key(0, 0), 1) == -5
    assert policy.score(Key(0, 1), 2) == -math.inf


def test_too_few_slots() -> None:
    with pytest.raises(OptionsError, match="11 expert slots for 4 layers"):
        Residency(11, range(4), 3, online_policy("lru"))


@pytest.mark.parametrize(
    ("policy", "prefetch", "swap"),
    [("lru", "hash", 0.0), ("decayed", "off", 0.0), ("lru", "router", 0.5)],
)
def test_the_engine_misses_what_the_simulator_says(
    bundle: Path, policy: str, prefetch: str, swap: float
) -> None:
    """Prefill, drafts and decoding, at two cache sizes; the draft layer has its own slots. With
    swaps the simulator chooses again, from the scores, and finds the engine's choices."""
    for slots in (LEAST, 44):
        engine = streamed(bundle, slots, policy=policy, prefetch=prefetch, swap=swap)
        recorder = engine.experts.trace = Recorder(TraceFacts.of("x", engine.config))
        engine.score(prompt(40), [20, 9, 3, *[1] * 4, 2, 1, 1])
        recorder.finish()
        section = engine.experts.sections[0]  # type: ignore[attr-defined]
        counted = section.residency.counts
        swaps = BoundedSwaps(swap) if swap else None
        said = simulate.replay(recorder.trace, slots, policy, prefetch, section.layers, swaps)
        assert said == counted
        if swaps is not None:
            assert swaps.counts == engine.experts._swaps.counts  # type: ignore[attr-defined]
            assert swaps.counts.swapped > 0 or slots == LEAST
        assert simulate.total(said).misses > 0
        speculative = section.reads.useful + section.reads.late + section.reads.wasted
        misses = simulate.total(said).misses + simulate.total(said).prefetched
        assert misses <= section.reads.records <= misses + speculative


def same(a: Candidates, b: Candidates) -> bool:
    pairs = ((a.ids, b.ids), (a.q, b.q), (a.score, b.score), (a.spread, b.spread))
    return all(np.array_equal(x, y) for x, y in pairs)


def test_trace_files(bundle: Path, tmp_path: Path) -> None:
    """Choices; in decoding also scores, and guesses where there were any. An older file is read
    without them, and what needs them says so."""
    engine = streamed(bundle, 40, prefetch="router")
    facts = TraceFacts.of("x", engine.config)
    writer, recorder = Writer(tmp_path / "t", facts), Recorder(facts)
    for trace in (writer, recorder):
        engine.experts.trace = trace
        engine.score(prompt(12), [9, 1, 1, 1])
    writer.close()
    recorder.finish()
    found = read(tmp_path / "t")
    assert found.facts == facts
    for a, b in zip(found.steps, recorder.trace.steps, strict=True):
        assert (a.n_tokens, a.last, list(a.chosen)) == (b.n_tokens, b.last, list(b.chosen))
        assert all(np.array_equal(a.chosen[n], b.chosen[n]) for n in a.chosen)
        assert list(a.scored) == list(b.scored) == (list(range(3, 7)) if a.n_tokens == 1 else [])
        assert all(same(a.scored[n], b.scored[n]) for n in a.scored)
        assert sorted(a.foreseen) == sorted(b.foreseen) == sorted(a.scored)
        assert all(np.array_equal(a.foreseen[n], b.foreseen[n]) for n in a.foreseen)
        for layer, best in a.scored.items():  # the router's choice leads, in order
            assert sorted(a.chosen[layer][0]) == sorted(best.ids[0, :3])
            assert (np.diff(best.q[0]) <= 0).all() and best.ids.shape == (1, 12)
    older = Writer(tmp_path / "old", facts)
    older.trace.steps = [Step(s.n_tokens, s.last, s.chosen) for s in recorder.trace.steps]
    older.close()
    head, _, body = (tmp_path / "old").read_bytes().partition(b"\n")
    (tmp_path / "old").write_bytes(head.replace(b'trace": 2', b'trace": 1') + b"\n" + body)
    plain = read(tmp_path / "old")
    hashed = simulate.total(simulate.replay(found, 40, "lru"))
    assert simulate.total(simulate.replay(plain, 40, "lru")) == hashed
    with pytest.raises(InputError, match="no scores"):
        simulate.replay(plain, 40, "lru", swaps=BoundedSwaps(0.1))
    with pytest.raises(InputError, match="--prefetch router"):
        simulate.replay(plain, 40, "lru", "router")
    (tmp_path / "new").write_bytes(head.replace(b'trace": 2', b'trace": 3') + b"\n" + body)
    with pytest.raises(InputError, match="version 3; this program reads 1 and 2"):
        read(tmp_path / "new")
    data = (tmp_path / "t").read_bytes()
    (tmp_path / "t").write_bytes(data[:-3])
    assert len(read(tmp_path / "t").steps) == len(found.steps) - 1
