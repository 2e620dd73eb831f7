"""Saved at every phase of the model's ratios, restored in another process, continued by 256 tokens:
bit for bit as if it had never stopped, read in chunks or drawn token by token, alone and several at
a time. The indexer selects throughout.
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


@pytest.mark.long
def test_every_phase(tmp_path: Path) -> None:
    engine = Engine.open("tiny", EngineOptions(prefill_chunk=64))
    assert engine.config.index_topk < FIRST / 4
    disk = DiskSessions(engine, Store.open(tmp_path / "kv", 1 << 40))
    session, expected = engine.session(), {}
    session.sync(make_prompt(engine, FIRST))
    assert disk.keep(session)
    for _ in session.generate(sampled(PHASES[-1] + AHEAD - FIRST)):
        if session.position in PHASES:
            assert disk.keep(session)
        if (start := session.position - AHEAD) in PHASES:
            expected[start] = digest(session)
    assert list(expected) == list(PHASES)
    ids = session.tokens
    fours = [[p, p + 32, p + 64, p + 96] for p in PHASES[:32]]
    eights = [list(PHASES[n : n + 8]) for n in range(0, 128, 8)]
    work = [("alone", list(PHASES)), *(("interleaved", four) for four in fours)]
    work += [("generated", eight) for eight in eights]
    work += [("generated", [FIRST + 127]), ("generated", fours[9])]
    job = {"folder": str(tmp_path / "kv"), "ids": ids, "work": work}
    done = subprocess.run(
        [sys.executable, "-m", "tests.tiny.restore_runner"],
        input=json.dumps(job), capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for (how, positions), found in zip(work, json.loads(done.stdout), strict=True):
        for position in positions:
            assert found[str(position)] == expected[position], (how, position)
