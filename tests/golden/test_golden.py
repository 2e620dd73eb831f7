"""The engine against logits that code independent of it computed.

Tolerances: 1e-4 in float32 is five times what two float32 evaluation orders of these models differ
by (2e-5, logits of about 10), and a hundredth of what the smallest visible mistake moves them by.
With the trained round trips on, a value on a rounding boundary moves the logits of its position, so
there nearly all positions must agree, not all.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ds4py import Engine, EngineOptions
from tests.golden import sets
from tools.golden.reference64 import Reference

EXACT = EngineOptions(dtype="float32", trained_rounding=False)
ROUNDED = EngineOptions(dtype="float32", trained_rounding=True)
TOLERANCE = 1e-4

WIDE_SEED = 49  # float32 noise does not move its rounded logits
UNEVEN = (1, 2, 3, 5, 7, 31, 64, 17, 129)


def uneven(count: int) -> list[int]:
    """Sizes that start and end inside blocks of every ratio, cut to `count` tokens."""
    sizes: list[int] = []
    while (left := count - sum(sizes)) > 0:
        sizes.append(min(left, UNEVEN[len(sizes) % len(UNEVEN)]))
    return sizes


def largest(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape
    return float(np.abs(a.astype(np.float64) - b).max())


def share_off(logits: np.ndarray, expected: np.ndarray) -> float:
    """Share of positions that a rounding boundary moved."""
    return float(np.mean(np.abs(logits - expected).max(axis=1) > 2e-3))


@pytest.fixture(scope="module", params=sets.NAMES)
def golden(request: pytest.FixtureRequest) -> Iterator[tuple[Engine, dict[str, np.ndarray]]]:
    yield Engine.open(sets.DATA / request.param, EXACT), sets.load(request.param)


@pytest.mark.parametrize("way", ["whole", "one by one", "uneven"])
def test_logits(golden: tuple[Engine, dict[str, np.ndarray]], way: str) -> None:
    engine, expected = golden
    ids = expected["input_ids"].tolist()
    chunks = {"whole": None, "one by one": [1] * len(ids), "uneven": uneven(len(ids))}[way]
    assert largest(engine.score(ids, chunks), expected["logits_prefill"]) < TOLERANCE


def test_draft_logits(golden: tuple[Engine, dict[str, np.ndarray]]) -> None:
    engine, expected = golden
    drafts = engine.score_mtp(expected["input_ids"].tolist())
    assert largest(drafts, expected["mtp_logits"]) < TOLERANCE


@pytest.mark.parametrize("name", sets.NAMES)
def test_trained_rounding(name: str) -> None:
    expected = sets.load(name)
    engine = Engine.open(sets.DATA / name, ROUNDED)
    logits = engine.score(expected["input_ids"].tolist())
    assert share_off(logits, expected["logits_rounded"]) <= 0.01
    moved = np.abs(expected["logits_prefill"] - expected["logits_rounded"]).max(axis=1)
    assert np.median(moved) > 0.1, "this set could not tell rounding from none"


def test_two_high_ratios_in_one_model(tmp_path: Path) -> None:
    """Ratios are data: 24 and 7 side by side, neither a power of two."""
    c, tensors, ids = sets.random_model("mixed", seed=5)
    folder = sets.write(tmp_path, c, {n: sets.plain(t) for n, t in tensors.items()})
    expected, _ = Reference(c, tensors).logits(ids)
    engine = Engine.open(folder, EXACT)
    assert largest(engine.score(ids.tolist()), expected) < TOLERANCE
    assert largest(engine.score(ids.tolist(), uneven(len(ids))), expected) < TOLERANCE


def test_heads_of_several_rounding_blocks(tmp_path: Path) -> None:
    """Heads of 512, as released: seven blocks of 64 channels are rounded, each by its own scale."""
    c, tensors, ids = sets.random_model("wide", seed=WIDE_SEED)
    folder = sets.write(tmp_path, c, {n: sets.plain(t) for n, t in tensors.items()})
    expected, _ = Reference(c, tensors).logits(ids)
    assert largest(Engine.open(folder, EXACT).score(ids.tolist()), expected) < TOLERANCE
    expected, _ = Reference(c, tensors, rounding=True).logits(ids)
    assert share_off(Engine.open(folder, ROUNDED).score(ids.tolist()), expected) <= 0.01


@pytest.mark.parametrize("name", sets.NAMES)
def test_the_two_references_agree(name: str) -> None:
    """transformers in float32 made the files; the float64 reference made their rounded part."""
    expected = sets.load(name)
    reference = Reference(*sets.checkpoint(name))
    logits, streams = reference.logits(expected["input_ids"])
    assert largest(logits, expected["logits_prefill"]) < TOLERANCE
    drafts = reference.draft(streams, expected["input_ids"])
    assert largest(drafts, expected["mtp_logits"]) < TOLERANCE
    rounded = Reference(*sets.checkpoint(name), rounding=True)
    assert largest(rounded.logits(expected["input_ids"])[0], expected["logits_rounded"]) < TOLERANCE
