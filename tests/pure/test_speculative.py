"""When guesses are made: never so that they lose more than the ledger grants, and where they pay.

Time is counted, not measured: a plain step takes one unit, a step with a guess `cost` of them.
"""

import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds4py.engine.speculative import AGAIN, HEAD_START, MEASURED, MOST_COST, SHARE, Gate

Right = Callable[[int, bool], bool]
"""Whether a guess is right: (steps so far, whether the last one guessed)."""


class Run:
    """Decoding with a gate, a cost and guesses that are right as `right` says."""

    def __init__(self, right: Right, cost: Callable[[], float], answer: int = 10**9):
        self.gate, self.right, self.cost, self.answer = Gate(), right, cost, answer
        self.tokens = self.steps = self.guesses = 0
        self.time, self.guessed, self.answers = 0.0, False, 0

    def until(self, n_tokens: int) -> "Run":
        while self.tokens < n_tokens:
            if self.tokens >= self.answers * self.answer:
                self.answers += 1
                self.gate.begin()
            self.guessed = self.gate.allows()
            self.steps += 1
            if self.guessed:
                self.guesses += 1
                cost, made = self.cost(), 1 + self.right(self.steps, self.guessed)
                self.gate.guessed(cost, made)
            else:
                cost, made = 1.0, 1
                self.gate.plain(cost)
            self.time += cost
            self.tokens += made
            assert self.time <= (1 + SHARE) * self.tokens + HEAD_START + 1e-9
        return self


def always(steps: int, guessed: bool) -> bool:
    return True


def never(steps: int, guessed: bool) -> bool:
    return False


@pytest.mark.parametrize("cost", [1.05, 1.25, 1.6, 2.4, MOST_COST])
@pytest.mark.parametrize("period", [0, 1, 2, 8, 9, 16, 64, 512])
def test_no_drafter_loses_more_than_is_granted(cost: float, period: int) -> None:
    """Never right, always right, and in turns: right while it is probed, wrong when it counts."""
    right = never if not period else lambda steps, _: steps // period % 2 == 0
    Run(right, lambda: cost).until(1500)


@given(st.randoms(use_true_random=False), st.floats(0, 1), st.integers(3, 400))
def test_nor_does_chance(chance: random.Random, p: float, answer: int) -> None:
    """Of any probability, with costs that change from step to step, over long answers and short."""
    costs = chance.uniform(1, MOST_COST), chance.uniform(1, MOST_COST)
    Run(lambda *_: chance.random() < p, lambda: chance.choice(costs), answer).until(500)


def test_the_worst_adversary_is_stopped() -> None:
    """One that knows the gate's averages: right until they are good, then wrong."""
    run = Run(never, lambda: 1.6)
    run.right = lambda *_: run.gate._made < 1.9
    run.until(5000)


def test_guesses_that_pay_are_made() -> None:
    """All but the plain steps that are measured."""
    run = Run(always, lambda: 1.4, answer=150).until(3000)
    measured = MEASURED * run.answers + run.guesses // AGAIN
    assert run.steps - run.guesses <= measured
    assert run.time / run.tokens < 0.75


def test_guesses_that_do_not_pay_stop() -> None:
    run = Run(never, lambda: 1.4).until(5000)
    assert run.gate.closed and run.guesses < 150, "eight steps, then ever fewer probes"


def test_a_drafter_that_becomes_good_is_found() -> None:
    run = Run(lambda steps, _: steps > 3000, lambda: 1.4).until(3000)
    before = run.guesses
    run.until(10_000)
    assert run.guesses - before > 2000


def test_one_slow_step_does_not_close_the_gate() -> None:
    """Something else kept the machine: plain steps or guesses, their usual time is what counts."""
    slow = iter([1.4] * 100 + [500.0] + [1.4] * 10_000)
    gate = Run(always, lambda: next(slow)).until(150).gate
    gate.plain(500.0)
    for _ in range(MEASURED):
        gate.plain(1.0)
    assert gate.allows()


def test_a_guess_needs_a_measure_of_plain_steps() -> None:
    gate = Gate()
    for _ in range(MEASURED):
        assert not gate.allows()
        gate.plain(1.0)
    assert gate.allows()
    gate.begin()
    assert not gate.allows()
