"""The engine against transformers, on models and tokens drawn here and committed nowhere."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from ds4py import Engine, EngineOptions
from tests.golden import sets

MISSING = [name for name in ("torch", "transformers") if not importlib.util.find_spec(name)]
pytestmark = [
    pytest.mark.reference,
    pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)}: the reference extra"),
    # the libraries' own notices about each other are not this project's errors
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]
EXACT = EngineOptions(dtype="float32", trained_rounding=False)


@pytest.mark.parametrize("seed", [11, 12])
@pytest.mark.parametrize("preset", ["flashlike", "fast", "prolike"])
def test_logits_and_drafts(preset: str, seed: int, tmp_path: Path) -> None:
    from tools.golden.transformers_model import TransformersModel

    c, tensors, ids = sets.random_model(preset, seed)
    folder = sets.write(tmp_path, c, {n: sets.plain(t) for n, t in tensors.items()})
    engine, reference = Engine.open(folder, EXACT), TransformersModel(c, tensors)
    expected = reference.logits(ids)
    random = np.random.default_rng(seed)
    sizes = random.multinomial(len(ids), [1 / 12] * 12).tolist()
    sizes = [size for size in sizes if size]
    for chunks in (None, sizes):
        assert np.abs(engine.score(ids.tolist(), chunks) - expected).max() < 1e-4
    assert np.abs(engine.score_mtp(ids.tolist()) - reference.draft(ids)).max() < 1e-4
    # the reference itself, in the same chunks: what two float32 evaluation orders differ by
    assert np.abs(reference.logits(ids, sizes) - expected).max() < 1e-4
