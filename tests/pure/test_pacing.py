"""Chunks of a prompt grow and shrink with what the ones before them took."""

import pytest

from ds4py.engine.pacing import FIRST, SHORTEST, Pacer


def test_the_first_chunk_is_short() -> None:
    assert Pacer().chunk(512) == FIRST
    assert Pacer().chunk(64) == 64


@pytest.mark.parametrize(
    ("token_ms", "tokens"), [(0.1, 512), (0.9, 512), (1.1, 256), (3.0, 128), (9.0, 32), (99.0, 32)]
)
def test_a_chunk_fits_the_limit_or_is_the_shortest(token_ms: float, tokens: int) -> None:
    pacer = Pacer(limit_s=0.5)
    pacer.took(128, 0.128 * token_ms)
    assert pacer.chunk(512) == tokens
    assert tokens * token_ms <= 500 or tokens == SHORTEST


def test_it_recovers_and_ignores_scraps() -> None:
    pacer = Pacer(limit_s=0.5)
    pacer.took(128, 10.0)
    pacer.took(3, 0.0001)
    assert pacer.chunk(512) == SHORTEST
    pacer.took(32, 0.001)
    assert pacer.chunk(512) == 512


def test_sizes_divide_what_was_asked_for() -> None:
    pacer = Pacer(limit_s=0.5)
    pacer.took(100, 1.0)
    assert [pacer.chunk(n) for n in (96, 200, 33, 1)] == [48, 50, 33, 1]
