"""Saved at every phase of the model's ratios, restored in another process, continued by 256 tokens:
bit for bit as if it had never stopped, alone and four at a time. The indexer selects throughout.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ds4py import Engine, EngineOptions
from ds4py.bench.speed import make_prompt
from ds4py.cache.store import Store
from ds4py.engine.disk import DiskSessions
from tests.tiny.restore_runner import AHEAD, digest, sampled

ROOT = Path(__file__).resolve().parents[2]
FIRST = 512
PHASES = range(FIRST, FIRST + 128)
DECODED = range(FIRST, FIRST + 128, 9)[:12]
"""Positions from which tokens are drawn one by one, at phases of all kinds."""


@pytest.mark.long
def test_every_phase(tmp_path: Path) -> None:
    engine = Engine.open("tiny", EngineOptions(prefill_chunk=64))
    assert engine.config.index_topk < FIRST / 4
    ids = make_prompt(engine, PHASES[-1] + AHEAD)
    disk = DiskSessions(engine, Store.open(tmp_path / "kv", 1 << 40))
    session, expected = engine.session(), {}
    for end in range(FIRST, len(ids) + 1):
        session.sync(ids[:end])
        if end in PHASES:
            assert disk.keep(session)
        if end - AHEAD in PHASES:
            expected[end - AHEAD] = digest(session)
    drawn = {}
    for position in DECODED:
        session = engine.session()
        session.sync(ids[:position])
        assert len(list(session.generate(sampled(position)))) == AHEAD
        drawn[position] = digest(session)
    fours = [[p, p + 32, p + 64, p + 96] for p in PHASES[:32]]
    work = [("alone", list(PHASES)), *(("interleaved", four) for four in fours)]
    work += [("generated", list(DECODED[n : n + 4])) for n in range(0, 8, 4)]
    work += [("generated", [position]) for position in DECODED[8:]]
    job = {"folder": str(tmp_path / "kv"), "ids": ids, "work": work}
    done = subprocess.run(
        [sys.executable, "-m", "tests.tiny.restore_runner"],
        input=json.dumps(job), capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for (how, positions), found in zip(work, json.loads(done.stdout), strict=True):
        for position in positions:
            wanted = drawn if how == "generated" else expected
            assert found[str(position)] == wanted[position], (how, position)
