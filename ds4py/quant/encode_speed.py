"""How many weights a second the encoders take, and how exact they are, on made-up weights."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from time import perf_counter, process_time
from typing import Any

import numpy as np

from ds4py.formats.gguf_blocks import FORMATS, decode
from ds4py.quant.encode import encode

COLS = 2048
SEED = 1


@dataclass(frozen=True)
class EncodeRate:
    """The median of several runs over the same weights."""

    format: str
    bits: float
    """Per weight."""
    importance: bool
    threads: int | None
    """None: all cores."""
    weights: int
    mega_weights: float
    """10^6 weights a second."""
    per_core: float
    """10^6 weights for each second of processor time: what other programs' load leaves alone."""
    megabytes: float
    """10^6 bytes of the encoded form a second."""
    error: float
    """Weighted squared error as a share of the weighted sum of squares."""
    runs: tuple[float, ...]
    """10^6 weights a second of each run."""


def measure(
    formats: Sequence[str] = tuple(FORMATS),
    weights: int = 1 << 20,
    threads: int | None = None,
    repeat: int = 3,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[EncodeRate]:
    """Two rates for each format, without and with an importance, on gaussian weights.

    `weights` is rounded up to whole rows of 2048. A first short run, in which the encoder is
    compiled, is not counted.
    """
    rng = np.random.default_rng(SEED)
    x = rng.standard_normal((-(-weights // COLS), COLS)).astype(np.float32)
    channels = np.exp(rng.standard_normal(COLS)).astype(np.float32)
    jobs = [(name, importance) for name in formats for importance in (None, channels)]
    rates = []
    for done, (name, importance) in enumerate(jobs):
        if progress:
            progress("encode", done, len(jobs))
        encode(name, x[:1], importance)
        runs, worked = [], process_time()
        for _ in range(repeat):
            start = perf_counter()
            data = encode(name, x, importance, threads)
            runs.append(x.size / (perf_counter() - start) / 1e6)
        worked = process_time() - worked
        w = np.ones(COLS) if importance is None else importance.astype(np.float64)
        error = float((w * (decode(name, data) - x) ** 2).sum() / (w * x**2).sum())
        rate, bits = statistics.median(runs), FORMATS[name].bits
        rates.append(
            EncodeRate(
                format=name,
                bits=bits,
                importance=importance is not None,
                threads=threads,
                weights=x.size,
                mega_weights=round(rate, 2),
                per_core=round(repeat * x.size / worked / 1e6, 2),
                megabytes=round(rate * bits / 8, 2),
                error=float(f"{error:.4g}"),
                runs=tuple(round(r, 2) for r in runs),
            )
        )
    return rates


def as_json(rates: Sequence[EncodeRate], machine: dict[str, Any]) -> dict[str, Any]:
    """One flat object: the rates and what they were measured on."""
    return {"bench": "encode", "rates": [asdict(rate) for rate in rates], "machine": machine}
