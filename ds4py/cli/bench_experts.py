"""`ds4 bench experts`: prints what `bench/experts.py` measures."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds4py.cli.model import announce, open_engine
from ds4py.cli.progress import ProgressBar
from ds4py.cli.settings import ModelChoice, Settings, models_directory
from ds4py.errors import OptionsError

if TYPE_CHECKING:
    from ds4py.experts.trace import Trace

PROMPT = 256
"""Tokens read before decoding begins."""


def run(model: ModelChoice, settings: Settings, trace: str | None, tokens: int, disk: bool) -> int:
    """Tables, then one line of JSON. The exit code."""
    from ds4py.bench import machine

    settings.engine_options()  # a bad value is told before anything is measured
    report: dict[str, Any] = {"bench": "experts", "model": model.name}
    if trace is not None:
        from ds4py.experts.trace import read

        found = read(Path(trace).expanduser())
        report["model"] = found.facts.model
    else:
        if disk:
            report["reads"], report["overlap"] = _disk(model)
        found, report["decode"] = _decode(settings, tokens)
    report["caches"], report["reuse"] = _caches(found), _reuse(found)
    report["ahead"], report["swaps"] = _ahead(found), _swaps(found)
    report["router"] = _router(found)
    print(json.dumps(report | {"machine": machine.describe()}))
    return 0


def _disk(model: ModelChoice) -> tuple[list[Any], list[Any]]:
    """Reads of records at several depths, and how far they hide behind computing."""
    from ds4py.bench import experts
    from ds4py.engine.engine import resolve
    from ds4py.weights.files import ModelFiles

    announce(model)
    files = ModelFiles.at(resolve(model.name, models_directory()))
    records = files.source().records()
    if records is None:
        raise OptionsError(
            f"{model.name} has no expert records to read; make a bundle with `ds4 quantize`, or "
            "measure a trace alone with --trace FILE"
        )
    rates = experts.read_rates(records)
    size = max(r.record_bytes for r in records.values())
    print(f"reads of records of {size} bytes, the fastest of several runs")
    print(f"{'in flight':>9} {'GB/s':>7} {'device':>7} {'share':>6} {'cpu':>6}")
    for rate in rates:
        share = rate.bytes_per_s / rate.device_bytes_per_s
        print(
            f"{rate.depth:9} {rate.bytes_per_s / 1e9:7.2f} {rate.device_bytes_per_s / 1e9:7.2f} "
            f"{100 * share:5.0f}% {100 * rate.cpu:5.0f}%"
        )
    best = max(rates, key=lambda rate: rate.bytes_per_s).depth
    hidden = list(experts.overlaps(records, best))
    print(f"\n{'compute:read':>12} {'compute':>8} {'read':>8} {'token':>8} {'bound':>8}   ms")
    for o in hidden:
        times = (o.compute_s, o.read_s, o.token_s, o.bound_s)
        print(f"{o.ratio:11.2f}:1 " + " ".join(f"{1e3 * t:8.1f}" for t in times))
    print()
    return [asdict(r) for r in rates], [asdict(o) | {"bound_s": o.bound_s} for o in hidden]


def _decode(settings: Settings, tokens: int) -> tuple["Trace", dict[str, Any]]:
    """A run of the model: its routing, its speed, and what streaming cost it."""
    from ds4py.bench import experts
    from ds4py.bench.speed import make_prompt

    engine, _ = open_engine(settings)
    with ProgressBar(sys.stderr) as bar:
        bar("decode", 0, 1)
        n_prompt = min(PROMPT, engine.context - tokens)
        if n_prompt < 1:
            raise OptionsError(f"--tokens {tokens} leaves no room in {engine.context} of context")
        trace, rate = experts.decode(engine, make_prompt(engine, n_prompt), tokens)
        bar("decode", 1, 1)
    stats = engine.experts.stats()
    print(f"decode  {rate:.1f} tok/s, experts {'streamed' if stats else 'resident'}")
    if stats:
        steps = max(1, stats["steps"])
        print(
            f"        {100 * stats['hit_rate']:.1f} % in time, {stats['misses'] / steps:.2f} "
            f"misses and {stats['bytes_read'] / steps / 1e6:.2f} MB a step, waited "
            f"{stats['stall_ms_p50']:.1f} ms (p50), {stats['stall_ms_p95']:.1f} ms (p95)"
        )
    print()
    return trace, {"tps": rate, **stats}


def _caches(trace: "Trace") -> list[dict[str, Any]]:
    """Hit rates of every policy and size on the trace."""
    from ds4py.bench import experts
    from ds4py.experts.simulate import POLICIES

    found = experts.cache_curve(trace)
    rates = {(r.slots, r.policy): r for r in found}
    print(f"{'slots':>6}" + "".join(f" {name:>18}" for name in POLICIES) + "   hits, misses a step")
    for slots in sorted({r.slots for r in found}):
        cells = [rates[slots, name] for name in POLICIES]
        row = "".join(f" {100 * c.hit_rate:9.1f}% {c.misses_per_step:7.2f}" for c in cells)
        print(f"{slots:6}{row}")
    print()
    return [asdict(r) for r in found]


def _reuse(trace: "Trace") -> dict[str, list[float]]:
    """How many of a token's experts earlier tokens chose, too."""
    from ds4py.bench import experts

    table = experts.reuse_table(trace)
    print(
        f"{'layer':>6} " + " ".join(f"{'lag ' + str(lag):>7}" for lag in experts.LAGS) + "   reuse"
    )
    for layer, shares in table.items():
        hashed = "  by token id" if layer in trace.facts.hash_layers else ""
        print(f"{layer:6} " + " ".join(f"{100 * s:6.1f}%" for s in shares) + hashed)
    print()
    return {str(layer): shares for layer, shares in table.items()}


def _ahead(trace: "Trace") -> list[dict[str, Any]]:
    """What ways of reading ahead leave to wait for, and what they read."""
    from ds4py.bench import experts

    found = experts.ahead_curve(trace)
    ways = list(dict.fromkeys(r.prefetch for r in found))
    print(f"{'slots':>6}" + "".join(f" {way:>15}" for way in ways) + "   misses, reads a step")
    return _by_slots(found, lambda c: f"{c.reads_per_step:7.2f}")


def _router(trace: "Trace") -> list[dict[str, Any]]:
    """Whether reading what the next layer's router guesses would pay, on a clock that only counts;
    nothing for a trace without guesses."""
    from ds4py.bench import ahead, experts

    if not any(step.foreseen for step in trace.steps):
        return []
    sizes = experts.cache_slots(trace, experts.CACHE_SIZES)
    found = list(ahead.gains(trace, sizes))
    print(f"the next layer's router guesses {100 * ahead.recall(trace):.0f} % of the experts")
    head = "".join(f" {ratio:>6g}:1" for ratio in ahead.RATIOS)
    print(f"{'slots':>6}{head}   tokens per second with its guesses, as a multiple, by")
    for slots in sizes:
        row = "".join(f" {g.speed:8.2f}" for g in found if g.slots == slots)
        print(f"{slots:6}{row}" + ("   computing to reading" if slots == sizes[0] else ""))
    print()
    return [asdict(g) for g in found]


def _swaps(trace: "Trace") -> list[dict[str, Any]]:
    """What cache-aware routing would save, by the regret allowed."""
    from ds4py.bench import experts

    found = experts.swap_curve(trace)
    regrets = list(dict.fromkeys(r.regret for r in found))
    if found:
        head = "".join(f" {'swap ' + format(regret, 'g'):>15}" for regret in regrets)
        print(f"{'slots':>6}{head}   misses a step, % swapped")
    return _by_slots(found, lambda c: f"{100 * c.swapped:6.1f}%")


def _by_slots(found: Sequence[Any], other: Callable[[Any], str]) -> list[Any]:
    """A line for each size of the cache: misses, and one other figure, of every way tried."""
    for slots in sorted({r.slots for r in found}):
        cells = [r for r in found if r.slots == slots]
        print(f"{slots:6}" + "".join(f" {c.misses_per_step:7.2f} {other(c)}" for c in cells))
    print()
    return [asdict(r) for r in found]
