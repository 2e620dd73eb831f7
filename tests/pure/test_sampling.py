"""Sampling against plain numpy: which tokens may be drawn, how often, and with which penalties."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds4py import SamplingOptions
from ds4py.engine.sampling import Sampler, logprobs
from ds4py.errors import OptionsError
from ds4py.kernels import sample

V = 12
logit_lists = st.lists(
    st.floats(-20, 20, width=32), min_size=V, max_size=V, unique=True
)  # ties are tested apart


def allowed(logits: Any, options: SamplingOptions) -> set[int]:
    """The tokens outside none of top-k, top-p, min-p, applied in that order, in float64."""
    order = np.argsort(-logits, kind="stable")
    kept = list(order[: options.top_k or V])
    p = np.exp(logits[kept] - logits[kept].max())
    p /= p.sum()
    before = np.cumsum(p) - p
    if options.top_p < 1:  # at 1 nothing is cut, though a sum may round up to it
        kept = [t for t, b in zip(kept, before, strict=True) if b < options.top_p]
    top = logits[kept].max()
    return {int(t) for t in kept if options.min_p == 0 or logits[t] >= top + np.log(options.min_p)}


@given(
    logit_lists,
    st.integers(0, V),
    st.sampled_from([0.05, 0.3, 0.77, 1.0]),
    st.sampled_from([0.0, 0.031, 0.4, 1.0]),
)
def test_restriction(values: list[float], top_k: int, top_p: float, min_p: float) -> None:
    logits = np.array(values, np.float32)
    options = SamplingOptions(top_k=top_k, top_p=top_p, min_p=min_p)
    found = kept(logits, options)
    wide = allowed(logits.astype(np.float64), options)
    borderline = abs(len(found) - len(wide)) <= 1 and top_p < 1  # a float32 sum at the boundary
    assert found == wide or (borderline and (found < wide or wide < found))
    assert int(logits.argmax()) in found
    options = SamplingOptions(top_k=top_k, top_p=top_p, min_p=min_p, seed=2)
    assert set(draw(logits, options, 20).tolist()) <= found


def kept(logits: Any, options: SamplingOptions) -> set[int]:
    settings = mx.array([[1.0, -np.inf, 1.0, 0.0, 0.0]])
    bounds = mx.array([[float(options.top_k), options.top_p]])
    limit = float(sample.bound_ref(mx.array(logits)[None], settings, bounds)[1].item())
    if options.min_p:
        limit = max(limit, float(logits.max() + np.float32(np.log(options.min_p))))
    return {int(t) for t in np.flatnonzero(logits >= limit)}


def test_ties_at_a_boundary_stay_together() -> None:
    options = SamplingOptions(top_k=2, top_p=0.5, min_p=1.0, seed=1)
    assert kept(np.zeros(6, np.float32), options) == set(range(6))
    assert set(draw(np.zeros(6, np.float32), options, 60).tolist()) == set(range(6))


def draw(logits: Any, options: SamplingOptions, n: int) -> Any:
    sampler = Sampler(options, [], V)
    tokens = [sampler(mx.array(logits), position) for position in range(n)]
    return np.array(mx.stack(tokens))


def test_frequencies_follow_the_softmax() -> None:
    logits = np.linspace(-2, 1, V).astype(np.float32)
    n, t = 6000, 0.7
    keys = mx.array(np.stack([sample.noise_key(11, position) for position in range(n)]))
    settings = mx.array([[t, -np.inf, 1, 0, 0]] * n)
    rows = mx.broadcast_to(mx.array(logits), (n, V))
    tokens = np.array(sample.token_ref(rows, settings, keys, mx.full(n, -mx.inf)))
    options = SamplingOptions(seed=11, temperature=t, min_p=0)
    assert tokens[:40].tolist() == draw(logits, options, 40).tolist()
    p = np.exp(logits.astype(np.float64) / t)
    expected = n * p / p.sum()
    counts = np.bincount(tokens, minlength=V)
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 31.3  # 0.1 % point of 11 degrees of freedom


def test_noise_depends_on_seed_and_position_only() -> None:
    logits = np.zeros(V, np.float32)
    first = draw(logits, SamplingOptions(seed=1), 50)
    assert first.tolist() == draw(logits, SamplingOptions(seed=1), 50).tolist()
    assert first.tolist() != draw(logits, SamplingOptions(seed=2), 50).tolist()
    assert len(set(first.tolist())) > 5
    late = Sampler(SamplingOptions(seed=1), [3, 4], V)
    assert int(late(mx.array(logits), 49)) == first[49]


def test_temperature_zero_takes_the_most_likely() -> None:
    logits = np.array([0, 3, 1, 3, *[0] * 8], np.float32)
    assert draw(logits, SamplingOptions(temperature=0), 3).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"repetition_penalty": 2.0}, [2.0, -4.0, 2.0, 0.5]),
        ({"presence_penalty": 0.5}, [4.0, -2.5, 2.0, 0.5]),
        ({"frequency_penalty": 0.5}, [4.0, -3.0, 2.0, 0.5]),
    ],
)
def test_penalties(options: dict[str, float], expected: list[float]) -> None:
    """Token 0 is in the prompt, token 1 was answered twice; 2 and 3 are new."""
    logits = mx.array([4.0, -2.0, 2.0, 0.5])
    sampler = Sampler(SamplingOptions(temperature=0, **options), [0], 4)  # type: ignore[arg-type]
    forced = mx.array([-9.0, 9.0, -9.0, -9.0])
    assert [int(sampler(forced * 9, p)) for p in range(2)] == [1, 1]
    seen = sampler._settings, sampler._in_prompt, sampler._counts
    np.testing.assert_allclose(np.array(sample.adjusted(logits[None], *seen, None))[0], expected)


def test_a_bias_moves_logits_and_forbids() -> None:
    logits = np.array([0.0, 1.0, 2.0, *[-9.0] * 9], np.float32)
    bias = ((0, 1.5), (2, -float("inf")))
    assert draw(logits, SamplingOptions(temperature=0, logit_bias=bias), 1).tolist() == [0]
    with pytest.raises(OptionsError, match="token 12"):
        Sampler(SamplingOptions(logit_bias=((V, 1.0),)), [], V)


class Alternating:
    """Even tokens after odd ones and the other way round, starting with odd; then anything."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def allowed(self) -> Any:
        if len(self.seen) >= 4:
            return None
        return np.arange(V) % 2 != (self.seen[-1] % 2 if self.seen else 0)

    def accept(self, token: int) -> None:
        self.seen.append(token)


def test_a_constraint_is_told_every_token_before_the_next_is_drawn() -> None:
    constraint = Alternating()
    sampler = Sampler(SamplingOptions(seed=3, min_p=0), [], V, constraint)
    tokens = [int(sampler(mx.zeros(V), position)) for position in range(9)]
    assert [token % 2 for token in tokens[:4]] == [1, 0, 1, 0]
    assert constraint.seen == tokens[:-1]
    plain = Sampler(SamplingOptions(seed=3, min_p=0), [], V)
    assert tokens[4:] == [int(plain(mx.zeros(V), position)) for position in range(9)][4:]


def test_logprobs_are_those_of_the_softmax() -> None:
    logits = np.linspace(-2, 1, V).astype(np.float32)
    p = np.exp(logits.astype(np.float64))
    expected = np.log(p / p.sum())
    own, top = logprobs(mx.array(logits), 2, 3)
    assert own == pytest.approx(expected[2], abs=1e-6)
    assert [token for token, _ in top] == [11, 10, 9]
    assert [value for _, value in top] == pytest.approx(list(expected[[11, 10, 9]]), abs=1e-6)


def test_a_guess_is_what_would_be_drawn_and_is_not_remembered() -> None:
    options = SamplingOptions(seed=3, temperature=0.8, frequency_penalty=3, presence_penalty=2)
    plain, guessing = (Sampler(options, [1], V) for _ in range(2))
    for position in range(12):
        wrong = mx.random.normal((V,), key=mx.random.key(position))
        guessing.guess(wrong, position + 1)
        guess = guessing.guess(mx.zeros(V), position)
        assert int(guess) == int(guessing(mx.zeros(V), position))
        assert int(guess) == int(plain(mx.zeros(V), position))
