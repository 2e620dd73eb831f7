"""Whole models with their shaders executed on the CPU, against the reference operations.

Both run in float32 and differ by the order of sums. A value on a rounding boundary of the trained
round trips then moves the logits of its position, so most positions must agree closely and all of
them roughly.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ds4py import Engine, EngineOptions, SamplingOptions, assets
from ds4py.cli.experts import counters
from ds4py.engine.decode import Decoder
from ds4py.kernels.build import Launcher
from ds4py.model.metal import EXPERTS
from tests.experts import models
from tests.golden import sets
from tests.golden.guesses import Eager

pytest.importorskip("ziglang")
from tools.metal_cpu import metal_kernel
from tools.metal_cpu.arrays import as_numpy

pytestmark = pytest.mark.shader


def make(name: str, input_names: list[str], **text: Any) -> Callable[..., list[Any]]:
    """A kernel on the CPU that also looks at what the project promises MLX: contiguous inputs."""
    kernel = metal_kernel(name, input_names, **text)

    def call(inputs: Any, **rest: Any) -> list[Any]:
        for argument, x in zip(input_names, inputs, strict=True):
            assert as_numpy(x).flags.c_contiguous, f"{name}: {argument} is not contiguous"
        return kernel(inputs=inputs, **rest)

    return call


def engines(path: Path | str, options: EngineOptions | None = None) -> tuple[Engine, Engine]:
    """The same model on the reference operations, and on shaders."""
    options = options or EngineOptions()
    metal = replace(options, kernels="metal")
    return Engine.open(path, options), Engine.open(path, metal, launcher=Launcher(make))


TWO_BIT = assets.path("models", "tiny")
"""IQ2_XXS and Q2_K experts, Q8_0 for most else."""
RELEASED = assets.path("models", "tiny-parent")
"""FP8, packed FP4 and BF16, as released checkpoints are."""


def some_tokens(n: int) -> list[int]:
    return [int(i) for i in np.random.default_rng(0).integers(20, 2048, n)]


def check(logits: np.ndarray, expected: np.ndarray) -> None:
    off = np.abs(logits - expected).max(axis=1)
    assert np.median(off) < 1e-3 and off.max() < 0.1


@pytest.mark.parametrize("chunks", [[1] * 6, [6], [5, 1]], ids=["one by one", "together", "both"])
def test_formats_of_released_checkpoints(chunks: list[int]) -> None:
    reference, metal = engines(RELEASED)
    check(metal.score(some_tokens(6), chunks), reference.score(some_tokens(6), chunks))


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingOptions(max_tokens=32, temperature=0, stop_at_eos=False),
        SamplingOptions(max_tokens=8, seed=5, presence_penalty=0.5, stop_at_eos=False),
        SamplingOptions(max_tokens=4, seed=5, top_k=40, top_p=0.9, stop_at_eos=False),
    ],
    ids=["greedy", "drawn", "of the likeliest"],
)
def test_the_two_bit_model_writes_the_same_tokens(sampling: SamplingOptions) -> None:
    written, logits = [], []
    for engine in engines(TWO_BIT):
        session = engine.session()
        session.sync(some_tokens(12))
        written.append([token.id for token in session.generate(sampling)])
        logits.append(np.array([session.logits()]))
        launcher = engine.launcher
    assert written[1] == written[0] and len(written[0]) == sampling.max_tokens
    check(logits[1], logits[0])
    assert launcher is not None
    assert set(launcher.counters) >= {"moe_gate_up", "moe_down", "attend_split", "sample_token"}


def test_guesses_change_no_token() -> None:
    """A step over two tokens on shaders, of which the draft layer guessed one."""
    options = EngineOptions(draft=True, prefill_chunk=8)
    plain, metal = engines(TWO_BIT, options)
    plain.decoder, metal.decoder = Decoder(plain.model), Decoder(metal.model, Eager(metal))
    ids = some_tokens(10)
    check(metal.score_mtp(ids), plain.score_mtp(ids))  # the second chunk sees rows of the first
    sampling = SamplingOptions(max_tokens=6, temperature=0, stop_at_eos=False)
    written, logits = [], []
    for engine in (plain, metal):
        session = engine.session()
        session.sync(ids)
        written.append([token.id for token in session.generate(sampling)])
        logits.append(np.array([session.logits()]))
    assert written[1] == written[0]
    check(logits[1], logits[0])
    found = metal.stats()["draft"]
    assert found["accepted"] >= 1 and found["drafted"] + found["accepted"] >= 5
    assert metal.stats()["kernels"]["plain"] == {}


def test_what_kernels_do_not_compute_is_counted() -> None:
    _, metal = engines(TWO_BIT)
    session, seen = metal.session(), []
    session.sync(some_tokens(2))
    assert metal.stats()["kernels"]["plain"] == {}
    metal.experts.observe = lambda layer, *_: seen.append(layer)
    session.sync(some_tokens(3))
    layers = len(metal.config.layers)
    assert len(seen) == layers and metal.stats()["kernels"]["plain"] == {EXPERTS: layers}
    said = counters(metal.stats())
    assert f"; {EXPERTS}: by MLX's own operations, {layers} times" in said
    assert counters({"draft": {}, "experts": {}, "kernels": {}}) == ""


@pytest.mark.long
def test_the_two_bit_model_reads_a_prompt() -> None:
    """300 tokens: more than a window, more index rows than are chosen, rows of every ratio."""
    reference, metal = engines(TWO_BIT)
    ids = some_tokens(302)
    check(metal.score(ids, [300, 1, 1]), reference.score(ids, [300, 1, 1]))


def test_experts_streamed_from_disk() -> None:
    """They are computed by plain operations; all around them by shaders."""
    reference, _ = engines(TWO_BIT)
    options = EngineOptions(kernels="metal", experts="streamed")
    metal = Engine.open(TWO_BIT, options, launcher=Launcher(make))
    ids, chunks = some_tokens(14), [10, 1, 1, 1, 1]
    check(metal.score(ids, chunks), reference.score(ids, chunks))


def test_a_packed_embedding(tmp_path: Path) -> None:
    """Rows are decoded where they are looked up, for steps, prompts and the draft layer."""
    formats = models.Q8["formats"] | {"embed": "Q8_0"}
    reference, metal = engines(models.make(tmp_path, {"formats": formats}))
    ids = models.prompt(14)
    check(metal.score(ids, [10, 1, 1, 1, 1]), reference.score(ids, [10, 1, 1, 1, 1]))
    check(metal.score_mtp(ids), reference.score_mtp(ids))


@pytest.mark.parametrize(
    "name", ["fast", *(pytest.param(name, marks=pytest.mark.long) for name in sets.NAMES[::2])]
)
def test_golden_logits(name: str) -> None:
    """Without rounding there are no boundaries: all logits agree, computed in float32."""
    expected = sets.load(name)
    _, metal = engines(sets.DATA / name, EngineOptions(dtype="float32", trained_rounding=False))
    ids = expected["input_ids"].tolist()
    logits = metal.score(ids, [len(ids) - 9, 1, 8])
    assert np.abs(logits - expected["logits_prefill"]).max() < 1e-4
    drafts = metal.score_mtp(ids[:20])
    assert np.abs(drafts - expected["mtp_logits"][:19]).max() < 1e-4
