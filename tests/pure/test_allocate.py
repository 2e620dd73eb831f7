"""Bit allocation: the tail exponent on known tails, the greedy walk against every choice."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds4py import assets
from ds4py.config import ModelConfig
from ds4py.quant import allocate
from ds4py.quant.allocate import Unit
from ds4py.quant.recipe import Recipe

FORMATS = len(allocate.FORMATS)


@pytest.mark.parametrize("a", [1.5, 3.0, 6.0])
@pytest.mark.parametrize("n", [5_000, 50_000])
def test_hill_finds_the_exponent_of_a_pareto_tail(a: float, n: int) -> None:
    """P(X > x) = x^-a has the density x^-(1 + a); three standard errors are 3 a / sqrt(k)."""
    values = np.random.default_rng(n).pareto(a, n) + 1
    assert abs(allocate.hill(values) - (1 + a)) < 3 * a / np.sqrt(0.1 * n)


def test_the_exponent_of_a_map_ignores_scale_and_rotation() -> None:
    rng = np.random.default_rng(0)
    w = (rng.standard_normal((96, 96)) * rng.pareto(2, 96)).astype(np.float32)
    turn = np.linalg.qr(rng.standard_normal((96, 96)))[0].astype(np.float32)
    alpha = allocate.tail_exponent(w)  # smaller than a tile, so it is not cut
    assert np.isclose(allocate.tail_exponent(1000 * w), alpha, rtol=1e-4)
    assert np.isclose(allocate.tail_exponent(turn @ w), alpha, rtol=1e-3)
    flat = rng.standard_normal((96, 96)).astype(np.float32)
    assert allocate.tail_exponent(flat) > alpha
    cut = allocate.tail_exponent(w, tile=32)
    assert np.isfinite(cut) and cut != alpha


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 24))
def test_greedy_is_the_best_choice_for_equal_sizes(seed: int, steps: int) -> None:
    """8 projections of 4 formats, convex costs: all 65,536 choices are tried."""
    rng = np.random.default_rng(seed)
    falls = -np.sort(-rng.random((8, 3)), axis=1)
    table = np.hstack([np.zeros((8, 1)), -np.cumsum(falls, axis=1)]) + falls.sum(1, keepdims=True)
    names = [Unit(i, "routed.up") for i in range(8)]
    costs = {unit: tuple(row) for unit, row in zip(names, table, strict=True)}
    sizes = dict.fromkeys(names, (10, 20, 30, 40))
    chosen = allocate.spend(costs, sizes, 80 + 10 * steps)
    got = sum(costs[unit][i] for unit, i in chosen.items())
    picks = np.array(list(itertools.product(range(4), repeat=8)))
    fits = picks[picks.sum(1) <= steps]
    best = sum(table[i, fits[:, i]] for i in range(8)).min()
    assert sum(chosen.values()) <= steps and np.isclose(got, best)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_the_budget_is_kept_and_spent_to_one_item(seed: int) -> None:
    rng = np.random.default_rng(seed)
    config = ModelConfig.load(assets.path("models", "tiny"))
    sizes = allocate.sizes(config)
    costs = {unit: tuple(-np.sort(-rng.random(FORMATS))) for unit in sizes}
    least = sum(size[0] for size in sizes.values())
    budget = least + int(rng.integers(0, 3 * least))
    chosen = allocate.spend(costs, sizes, budget)
    used = sum(sizes[unit][i] for unit, i in chosen.items())
    assert used <= budget
    steps = [sizes[u][i + 1] - sizes[u][i] for u, i in chosen.items() if i + 1 < FORMATS]
    assert not steps or budget - used < min(steps)


def test_a_choice_is_a_recipe() -> None:
    chosen = {Unit(2, "routed.down"): 2, Unit(1, "routed.gate"): 1}
    recipe = Recipe.from_dict(allocate.as_recipe("mine", chosen), 4)
    assert recipe.format_of("layers.2.ffn.experts.0.w2.weight") == "Q4_K"
    assert recipe.format_of("layers.1.ffn.experts.0.w1.weight") == "Q2_K"
    assert recipe.format_of("layers.1.ffn.experts.0.w3.weight") == "IQ2_XXS"
