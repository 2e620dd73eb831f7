"""Logits do not depend on how many threads BLAS has, where every other test gives it one."""

import os
import subprocess
import sys
from pathlib import Path

from tests.golden.sets import DATA

ROOT = Path(__file__).resolve().parents[2]

SCORE = """
import hashlib, sys
import numpy as np
from ds4py import Engine
ids = np.random.default_rng(0).integers(0, 96, 150).tolist()
engine = Engine.open(sys.argv[1])
whole = engine.score(ids)
assert np.array_equal(engine.score(ids, [100, 40, 3, *[1] * 7]), whole)
print(hashlib.sha256(whole.tobytes()).hexdigest())
"""
"""A chunk that is large enough for several threads to share a product, and decoding."""


def scored(threads: int) -> str:
    env = {**os.environ, "OPENBLAS_NUM_THREADS": str(threads)}
    command = [sys.executable, "-c", SCORE, str(DATA / "flashlike")]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_any_number_of_threads_gives_the_same_bits() -> None:
    assert scored(1) == scored(2) == scored(3)
