"""Options that make no sense are refused by name."""

from typing import Any

import pytest

from ds4py import EngineOptions, SamplingOptions
from ds4py.errors import OptionsError
from ds4py.sizes import format_size, parse_size


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", -3),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", 2.0),
        ("repetition_penalty", 0.0),
        ("presence_penalty", float("nan")),
        ("frequency_penalty", 1e9),
        ("seed", -1),
        ("stop", ("",)),
    ],
)
def test_sampling(field: str, value: Any) -> None:
    with pytest.raises(OptionsError, match=field):
        SamplingOptions(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [("context", 0), ("dtype", "float16"), ("experts", "elsewhere"), ("prefill_chunk", 0)],
)
def test_engine(field: str, value: Any) -> None:
    with pytest.raises(OptionsError, match=field):
        EngineOptions(**{field: value})


def test_defaults_are_the_familys() -> None:
    o = SamplingOptions()
    assert (o.temperature, o.top_p, o.min_p, o.top_k) == (1.0, 1.0, 0.05, 0)


@pytest.mark.parametrize(
    ("text", "n"),
    [("24GB", 24 * 10**9), ("512 MiB", 512 * 2**20), ("1.5g", 15 * 10**8), ("4096", 4096)],
)
def test_sizes(text: str, n: int) -> None:
    assert parse_size(text) == n


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "24QB", "0", "1e9"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(OptionsError, match="memory"):
        parse_size(text)


def test_format_size() -> None:
    assert [format_size(n) for n in (999, 81e9, 1.6e12)] == ["999 B", "81.0 GB", "1.60 TB"]
