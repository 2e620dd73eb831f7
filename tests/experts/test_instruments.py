"""The instruments: they run, add up, and order what is known to be ordered."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ds4py.bench import experts
from ds4py.experts.trace import read, usage
from ds4py.weights.files import ModelFiles
from tests.experts.models import prompt, streamed
from tests.experts.test_policy import markov

ROOT = Path(__file__).parents[2]


def ds4(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ds4py", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


def test_hits_grow_with_the_cache_and_belady_leads() -> None:
    curve = experts.cache_curve(markov(300, 0.4))
    for policy in ("lru", "belady"):
        rates = [r.hit_rate for r in curve if r.policy == policy]
        assert rates == sorted(rates) and len(rates) > 3
    best = {r.slots: r.hit_rate for r in curve if r.policy == "belady"}
    assert all(r.hit_rate <= best[r.slots] for r in curve)
    assert max(r.slots for r in curve) == 40 and curve[-1].misses_per_step < 0.2


def test_reads_and_overlap(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "SECONDS", 0.02)
    monkeypatch.setattr(experts, "DEPTHS", (1, 3))
    records = ModelFiles.at(bundle).source().records()
    assert records is not None
    rates = experts.read_rates(records, repeat=1)
    assert [r.depth for r in rates] == [1, 3]
    assert all(r.bytes_per_s > 0 and r.device_bytes_per_s > 0 for r in rates)
    loops = list(experts.overlaps(records, 2, n_tokens=2, repeat=1))
    assert [o.ratio for o in loops] == [4.0, 1.0, 0.25]
    assert all(o.token_s >= o.compute_s for o in loops)  # nothing is skipped


def test_a_run_of_the_model(bundle: Path) -> None:
    engine = streamed(bundle, 40)
    trace, rate = experts.decode(engine, prompt(10), 6)
    assert rate > 0 and engine.experts.trace is None
    assert [s.n_tokens for s in trace.steps] == [10, *[1] * 6]
    stats = engine.experts.stats()
    asked = stats["hits"] + stats["prefetched"] + stats["misses"]
    assert stats["hit_rate"] == (asked - stats["misses"]) / asked
    ahead = sum(stats[f"ahead_{name}_bytes"] for name in ("useful", "late", "wasted"))
    missed = 32768 * stats["misses"]
    assert missed <= stats["bytes_read"] <= missed + ahead


def test_trace_replay_and_picture(tmp_path: Path) -> None:
    """`ds4 generate --trace` and what can be made of it; also with resident experts."""
    file = tmp_path / "run.trace"
    ds4("generate", "hi", "--max-tokens", "12", "--seed", "1", "--trace", str(file))
    trace = read(file)
    chosen = sum(int(counts.sum()) for counts in usage(trace).values())
    n_tokens = sum(step.n_tokens for step in trace.steps)
    assert chosen == n_tokens * trace.facts.n_layers * trace.facts.n_chosen
    done = ds4("bench", "experts", "--trace", str(file))
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert report["bench"] == "experts" and len(report["reuse"]) == trace.facts.n_layers
    assert {c["policy"] for c in report["caches"]} == {"lru", "decayed", "belady"}
    pytest.importorskip("matplotlib")
    script = [sys.executable, str(ROOT / "tools" / "plot_experts.py"), str(file)]
    for name, start in (("a.png", b"\x89PNG"), ("a.svg", b"<?xml")):
        env = {"MPLCONFIGDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
        subprocess.run([*script, str(tmp_path / name)], check=True, env=env)
        assert (tmp_path / name).read_bytes().startswith(start)
