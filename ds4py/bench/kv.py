"""What sessions on disk are worth: restoring against reading again, saving a turn, and eviction.

Everything goes through `Engine`, `Session` and the store, in a directory that is then removed.
Files come from the system's page cache, as they do for a conversation that goes on.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from ds4py.bench import trace
from ds4py.bench.speed import make_prompt
from ds4py.cache.store import Store
from ds4py.engine.disk import DiskSessions
from ds4py.errors import InputError, OptionsError

if TYPE_CHECKING:
    from ds4py import Engine

LENGTHS = (512, 2000, 8000)
TURN = 200
"""Tokens of the turn whose saving is measured."""
BUDGETS = (30_000, 60_000, 100_000, 150_000, 250_000)
"""Disk space for the trace, in tokens' worth of rows."""
REQUESTS = 400
SEEDS = (1, 2, 3)
SLACK = 64 * 1024

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Restore:
    """Time to the first token of a prompt, read or restored. Medians, in seconds."""

    tokens: int
    read_s: float
    restore_s: float
    n_bytes: int
    """All files the snapshot needs."""

    @property
    def times(self) -> float:
        """How much sooner."""
        return self.read_s / self.restore_s


@dataclass(frozen=True)
class Save:
    """What `TURN` more tokens cost a session of so many."""

    tokens: int
    seconds: float
    n_bytes: int
    allowed: int
    """The turn's rows and a quarter, 64 KiB, one frontier."""


@dataclass(frozen=True)
class Traced:
    """Share of the prompts' tokens read anew at one disk budget, by rule; means over the seeds."""

    budget: int
    recomputed: dict[str, float]


def measure(
    engine: Engine,
    lengths: Sequence[int] = LENGTHS,
    repeat: int = 3,
    progress: Progress | None = None,
) -> tuple[list[Restore], list[Save]]:
    """Restores and saves at each length that fits the context. Raises OptionsError when none."""
    lengths = [n for n in lengths if n + TURN <= engine.context]
    if not lengths:
        raise OptionsError(f"a context of {engine.context} tokens is too short to measure in")
    prompt, restores, saves = make_prompt(engine, max(lengths) + TURN), [], []
    for n, length in enumerate(lengths):
        with tempfile.TemporaryDirectory() as folder:
            disk = DiskSessions(engine, Store.open(Path(folder) / "kv", 1 << 40))
            restores.append(_restore(engine, disk, prompt[:length], repeat))
            saves.append(_save(engine, disk, prompt[: length + TURN]))
            disk.store.close()
        if progress is not None:
            progress("measure", n + 1, len(lengths))
    return restores, saves


def replay(
    token_bytes: float,
    frontier_bytes: int,
    budgets: Sequence[int] = BUDGETS,
    n_requests: int = REQUESTS,
    seeds: Sequence[int] = SEEDS,
    progress: Progress | None = None,
) -> list[Traced]:
    """The agents' trace under every rule at every budget (in tokens' worth of rows)."""
    traces, results, done = [trace.make_trace(n_requests, seed) for seed in seeds], [], 0
    for budget in budgets:
        shares: dict[str, float] = {}
        for name in trace.POLICIES:
            n_bytes = int(budget * token_bytes)
            runs = [
                trace.recomputed(one, name, n_bytes, token_bytes, frontier_bytes) for one in traces
            ]
            shares[name] = round(statistics.mean(runs), 4)
            done += 1
            if progress is not None:
                progress("replay", done, len(budgets) * len(trace.POLICIES))
        results.append(Traced(int(budget * token_bytes), shares))
    return results


def token_bytes(engine: Engine) -> float:
    """Rows of one token of context, all layers together."""
    state = engine.model.new_state()
    return sum(state.rows[s.name].row_bytes * len(s.layers) / s.ratio for s in state.series)


def frontier_bytes(engine: Engine, position: int = 190) -> int:
    """A checkpoint at a position that is half-way between two of the grid."""
    state = engine.model.new_state()
    share = {s.name: s.needed(position) / s.history for s in state.series}
    kept, values = state.frontier, state.frontier.values
    pooled = (array.nbytes * share[name] for name, array in values.items())
    return int(kept.window.nbytes + kept.streams.nbytes + sum(pooled))


def _restore(engine: Engine, disk: DiskSessions, prompt: list[int], repeat: int) -> Restore:
    reads, restores, logits = [], [], []
    for _ in range(repeat):
        session = engine.session()
        start = perf_counter()
        session.sync(prompt)
        reads.append(perf_counter() - start)
    logits.append(session.logits())
    if not disk.keep(session):
        raise InputError(f"nothing could be saved: {disk.store.trouble}")
    for _ in range(repeat + 1):
        session = engine.session()
        start = perf_counter()
        disk.restore(session, prompt)
        session.sync(prompt)
        restores.append(perf_counter() - start)
    if session.reused != len(prompt) or session.logits() != logits[0]:
        raise InputError("a restored session differs from the one that was saved")
    n_bytes = disk.store.stats()["bytes"]
    median = statistics.median
    return Restore(len(prompt), median(reads), median(restores[1:]), n_bytes)


def _save(engine: Engine, disk: DiskSessions, prompt: list[int]) -> Save:
    session = engine.session()
    disk.restore(session, prompt)
    session.sync(prompt)
    before = _size(disk.store.directory)
    start = perf_counter()
    disk.keep(session)
    seconds = perf_counter() - start
    rows = TURN * token_bytes(engine) * 1.25
    frontier = engine.model.new_state().frontier.n_bytes
    return Save(
        len(prompt) - TURN,
        seconds,
        _size(disk.store.directory) - before,
        int(rows + SLACK + frontier),
    )


def _size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def as_json(
    engine: Engine,
    restores: Sequence[Restore],
    saves: Sequence[Save],
    traced: Sequence[Traced],
    machine: dict[str, Any],
) -> dict[str, Any]:
    """One object: every figure, the model and what it ran on."""
    return {
        "bench": "kv",
        "model": engine.name,
        "bytes_per_token": round(token_bytes(engine), 2),
        "frontier_bytes": engine.model.new_state().frontier.n_bytes,
        "restore": [asdict(r) | {"times": round(r.times, 1)} for r in restores],
        "save": [asdict(s) for s in saves],
        "trace": [asdict(t) for t in traced],
        "machine": machine,
    }
