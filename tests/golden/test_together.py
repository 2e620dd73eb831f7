"""Sequences that share their decoding steps get exactly what each would get alone."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from ds4py import Engine, EngineOptions, SamplingOptions
from ds4py.engine.session import Session, Token
from tests.golden import sets

GREEDY = SamplingOptions(temperature=0, max_tokens=40, stop_at_eos=False)
WARM = SamplingOptions(seed=5, max_tokens=40, stop_at_eos=False, presence_penalty=0.5)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.open(sets.DATA / "flashlike", EngineOptions())


def prompt(engine: Engine, i: int) -> list[int]:
    """Lengths on both sides of closing windows, and enough rows for a choice among them."""
    n_tokens = (129, 40, 127, 6)[i]
    return np.random.default_rng(i).integers(2, engine.config.vocab_size, n_tokens).tolist()


def started(engine: Engine, i: int) -> tuple[Session, Iterator[Token]]:
    session = engine.session()
    session.sync(prompt(engine, i))
    return session, session.generate(GREEDY if i % 2 else WARM)


def alone(engine: Engine, i: int, n: int) -> tuple[list[int], list[float]]:
    session, tokens = started(engine, i)
    ids = [next(tokens).id for _ in range(n)]
    tokens.close()
    return ids, session.logits()


def count_steps(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    begin, steps = engine.model.experts.begin, []
    monkeypatch.setattr(
        engine.model.experts, "begin", lambda *args, **more: (steps.append(1), begin(*args, **more))
    )
    return lambda: len(steps)


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_streams_in_turn_share_steps_and_change_nothing(
    kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine.open(sets.DATA / "flashlike", EngineOptions(kernels=kernels))
    expected = [alone(engine, i, 12) for i in range(4)]
    running = [started(engine, i) for i in range(4)]
    n_steps = count_steps(engine, monkeypatch)
    made = [[next(tokens).id for _, tokens in running] for _ in range(12)]
    assert n_steps() == 4 + 11  # each begins alone
    for i, (session, tokens) in enumerate(running):
        tokens.close()
        assert [ids[i] for ids in made] == expected[i][0]
        assert session.logits() == expected[i][1]


def test_a_stream_that_waits_is_one_token_ahead_at_most_and_steps_back(engine: Engine) -> None:
    ids, logits = alone(engine, 1, 3)
    slow, slow_tokens = started(engine, 1)
    assert [next(slow_tokens).id for _ in range(3)] == ids
    other, other_tokens = started(engine, 0)
    for _ in range(10):
        next(other_tokens)
    slow_tokens.close()
    assert slow.tokens == prompt(engine, 1) + ids
    assert slow.logits() == logits
    assert slow._state.position == slow.position
    assert other.tokens[129:] == alone(engine, 0, 10)[0]


def test_a_session_that_went_on_is_not_stepped_back(engine: Engine) -> None:
    slow, slow_tokens = started(engine, 1)
    next(slow_tokens)
    _, other_tokens = started(engine, 0)
    next(other_tokens)
    slow.sync(prompt(engine, 2))
    slow_tokens.close()
    fresh = engine.session()
    fresh.sync(prompt(engine, 2))
    assert slow.logits() == fresh.logits()


def test_a_failed_choice_ends_its_own_stream_only(engine: Engine) -> None:
    class Broken:
        """A constraint that gives up after two tokens."""

        def __init__(self) -> None:
            self.left = 2

        def allowed(self) -> None:
            if not self.left:
                raise RuntimeError("no token is left")

        def accept(self, token: int) -> None:
            self.left -= 1

    session = engine.session()
    session.sync(prompt(engine, 1))
    broken = session.generate(GREEDY, Broken())
    other, others = started(engine, 0)
    made = []
    with pytest.raises(RuntimeError, match="no token"):
        for token in broken:
            made.append(token.id)
            next(others)
    assert session.tokens[40:] == made
    assert [next(others).id for _ in range(5)]
    assert other.tokens[129:] == alone(engine, 0, len(other.tokens) - 129)[0]
