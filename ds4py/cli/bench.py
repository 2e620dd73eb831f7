"""`ds4 bench`: prints what the instruments of `bench/` measure."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ds4py.cli.model import announce, open_engine, tell_mlx
from ds4py.cli.progress import ProgressBar
from ds4py.cli.settings import ModelChoice, Settings, models_directory
from ds4py.sizes import format_size

if TYPE_CHECKING:
    from ds4py.bench.kernels import StepCost

POSITIONS = (1000, 100_000, 1_000_000)
"""Tokens before the steps that are counted."""


def run_speed(settings: Settings, tokens: int, repeat: int, json_only: bool) -> int:
    """Measure tokens per second; a table, then one line of JSON. The exit code."""
    engine, load_s = open_engine(settings)
    from ds4py.bench import machine, speed

    with ProgressBar(sys.stderr) as bar:
        rates = speed.measure(engine, tokens, repeat, progress=bar)
    host = machine.describe()
    if not json_only:
        print(f"{engine.name} on {host['processor']}, {host['cores']} cores, {host['backend']}")
        print(f"{'work':8} {'at':>6} {'tok/s':>9}   runs")
        for rate in rates:
            runs = "  ".join(f"{run:.1f}" for run in rate.runs)
            print(f"{rate.work:8} {rate.at:6} {rate.tps:9.1f}   {runs}")
    result = speed.as_json(engine, rates, host) | {"load_s": round(load_s, 4)}
    print(json.dumps(result))
    return 0


def run_encode(weights: int, repeat: int) -> int:
    """Measure the block encoders; a table, then one line of JSON. The exit code."""
    from ds4py.bench import machine
    from ds4py.quant import encode_speed

    with ProgressBar(sys.stderr) as bar:
        rates = encode_speed.measure(weights=weights, repeat=repeat, progress=bar)
    print(f"{'format':8} {'bits':>6} {'importance':>10} {'Mweights/s':>10} {'per core':>9}  error")
    for rate in rates:
        how = "yes" if rate.importance else "no"
        speeds = f"{rate.mega_weights:10.1f} {rate.per_core:9.1f}"
        print(f"{rate.format:8} {rate.bits:6.3f} {how:>10} {speeds}  {rate.error:.2e}")
    print(json.dumps(encode_speed.as_json(rates, machine.describe())))
    return 0


def run_kv(settings: Settings, repeat: int, with_trace: bool, json_only: bool) -> int:
    """Measure sessions on disk; tables, then one line of JSON. The exit code."""
    engine, _ = open_engine(settings)
    from ds4py.bench import kv, machine

    per_token = kv.token_bytes(engine)
    with ProgressBar(sys.stderr) as bar:
        restores, saves = kv.measure(engine, repeat=repeat, progress=bar)
        traced = kv.replay(per_token, kv.frontier_bytes(engine), progress=bar) if with_trace else []
    if not json_only:
        print(f"{engine.name}: {per_token:.1f} bytes of rows a token")
        print(f"{'tokens':>7} {'read s':>9} {'restore s':>9} {'times':>6} {'bytes':>9}")
        for r in restores:
            times = f"{r.read_s:9.4f} {r.restore_s:9.4f} {r.times:6.1f}"
            print(f"{r.tokens:7} {times} {r.n_bytes:9}")
        print(f"{'tokens':>7} {f'+{kv.TURN} s':>9} {'bytes':>9} {'allowed':>9}")
        for save in saves:
            print(f"{save.tokens:7} {save.seconds:9.4f} {save.n_bytes:9} {save.allowed:9}")
        if traced:
            print(f"{'disk bytes':>10}  share of the prompts read anew")
        for t in traced:
            shares = "  ".join(f"{name} {share:.3f}" for name, share in t.recomputed.items())
            print(f"{t.budget:10}  {shares}")
    print(json.dumps(kv.as_json(engine, restores, saves, traced, machine.describe())))
    return 0


def run_kernels(model: ModelChoice, positions: Sequence[int], json_only: bool) -> int:
    """Count what a step launches and reads, and time it on a GPU: a token after each of
    `positions`; after the last one, tokens of several sequences together, and a prompt's chunk.
    The exit code."""
    tell_mlx()
    from ds4py.bench import kernels, machine
    from ds4py.config import ModelConfig
    from ds4py.engine.engine import resolve
    from ds4py.engine.options import EngineOptions
    from ds4py.kernels import build
    from ds4py.quant.recipe import default_format
    from ds4py.weights.files import ModelFiles

    path = Path(model.name).expanduser()
    if path.suffix == ".json" and path.is_file():
        config = ModelConfig.from_dict(json.loads(path.read_text(encoding="utf-8")))
    else:
        announce(model)
        config = ModelFiles.at(resolve(model.name, models_directory())).config
    longest, chunk = config.max_position_embeddings, EngineOptions().prefill_chunk
    at = [n for n in positions or POSITIONS if n < longest] or [longest - 1]
    costs = [kernels.trace_step(config, default_format, n) for n in at]
    costs += [kernels.trace_step(config, default_format, at[-1], 1, s) for s in kernels.TOGETHER]
    before = max(0, min(at[-1], longest - chunk))
    costs.append(kernels.trace_step(config, default_format, before, chunk))
    times = []
    if build.metal_available() and path.suffix != ".json":
        engine, _ = open_engine(Settings(model))
        times = [kernels.time_token(engine, n) for n in at if n + 32 <= engine.context]
    if not json_only:
        for cost in costs:
            _print_cost(cost)
        for t in times:
            rates = f"{t.gb_per_s:.0f} GB/s; plain reading: {t.limit_gb_per_s:.0f}"
            print(f"on this GPU after {t.position}: {t.ms:.2f} ms a token, {rates}")
    print(
        json.dumps(
            {
                "bench": "kernels",
                "steps": [asdict(c) for c in costs],
                "times": [asdict(t) for t in times],
            }
            | {"machine": machine.describe()}
        )
    )
    return 0


def _print_cost(cost: "StepCost") -> None:
    what, single = "one token", cost.n_tokens == cost.n_sequences == 1
    if cost.n_sequences > 1:
        what = f"{cost.n_sequences} sequences' tokens"
    elif cost.n_tokens > 1:
        what = f"a prompt's {cost.n_tokens} tokens"
    read = f", {format_size(sum(cost.n_bytes.values()))} read" if single else ""
    print(f"{what} after {cost.position}: {cost.launches} launches{read}")
    maker, size = cost.largest
    print(f"  built in {cost.build_ms:.2f} ms; largest new buffer {format_size(size)}, of {maker}")
    if not single:
        return
    for name, count in sorted(cost.kernels.items(), key=lambda item: -item[1]):
        print(f"  {name:20} {count:5}")
    print(f"  {'of MLX':20} {sum(cost.operations.values()):5}   {_listed(cost.operations)}")
    for name, n_bytes in sorted(cost.n_bytes.items(), key=lambda item: -item[1]):
        print(f"  {name:20} {format_size(n_bytes):>10}")


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {n}" for name, n in sorted(counts.items()))
