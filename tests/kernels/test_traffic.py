"""What the kernels that read weights load, at the row lengths of V4-Flash: each byte once, in whole
lines of 128 bytes. Counted on the CPU; how a GPU's caches serve it is not."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from ds4py.kernels import dense, moe
from ds4py.kernels.build import Launcher
from ds4py.kernels.formats import row_bytes
from tests.kernels.near import traffic
from tests.kernels.shaders import LATER
from tests.kernels.test_dense import matrices, residual
from tests.kernels.test_moe import some_experts

pytestmark = pytest.mark.shader

D, INNER, LATENT, OUT = 4096, 2048, 1024, 8192
"""Hidden width, an expert's width, query latent, and the input of the last projection."""


def activations(*shape: int) -> Any:
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    return mx.array(x).astype(mx.bfloat16)


def reads_once(found: Any, needed: int, lines: float = 0.9) -> None:
    assert found.touched == needed
    assert found.loaded <= 1.01 * needed
    assert found.efficiency >= lines


ROWS = [1, 8, *(pytest.param(s, marks=LATER) for s in (2, 3, 4, 5))]
"""Activation rows; six and seven share the plan of eight."""

# Matrices of 64 rows, and how much of the lines that they touch is theirs, for every number of
# activation rows. What is lacking are the lines that neighbouring rows share.
LINES = {
    D: {"Q8_0": 1.0, "FP8": 0.97, "MXFP4": 1.0, "Q4_K": 1.0, "Q6_K": 0.97, "IQ2_XXS": 0.91}
    | {"F16": 1.0, "F32": 1.0},
    LATENT: {"Q8_0": 0.94, "FP8": 0.90, "BF16": 1.0},
    OUT: {"Q8_0": 1.0, "FP8": 0.99},
}


@pytest.mark.parametrize("s", ROWS)
@pytest.mark.parametrize("n_in", LINES)
def test_projections_read_whole_lines(s: int, n_in: int) -> None:
    x, weights = activations(s, n_in), matrices([(name, 64) for name in LINES[n_in]], n_in)

    def run(shaders: Launcher) -> Any:
        return dense.project(shaders, x, weights, mx.bfloat16)

    found = traffic(run, "dense_project")
    for i, (m, lines) in enumerate(zip(weights, LINES[n_in].values(), strict=True)):
        reads_once(found[f"w{i}"], m.rows.size, lines)
    assert found["x"].efficiency == 1


@pytest.mark.parametrize("s", ROWS)
@pytest.mark.parametrize("name", ["IQ2_XXS", pytest.param("MXFP4", marks=LATER)])
def test_gate_and_up_read_whole_lines(s: int, name: str) -> None:
    """All rows choose the same two of three experts, whose bytes are then read once."""
    slots, weights = mx.array([[2, 0]] * s, mx.int32), mx.ones((s, 2))
    experts = some_experts(3, D, 64, name, "F16")
    gate, up = matrices([("Q8_0", 64)] * 2, D)
    x = activations(s, D)

    def run(shaders: Launcher) -> Any:
        return moe.gate_up(shaders, x, experts, slots, weights, (gate, up), 10.0)

    found = traffic(run, "moe_gate_up")
    reads_once(found["records"], 2 * 2 * 64 * row_bytes(name, D))
    for shared in ("shared_gate", "shared_up"):
        reads_once(found[shared], gate.rows.size, 1.0)


@pytest.mark.parametrize("s", ROWS)
@pytest.mark.parametrize(
    "name", ["Q2_K", *(pytest.param(n, marks=LATER) for n in ("MXFP4", "Q4_K"))]
)
def test_down_reads_whole_lines(s: int, name: str) -> None:
    slots, experts = mx.array([[2, 0]] * s, mx.int32), some_experts(3, 128, INNER, "Q8_0", name)
    (down,) = matrices([("Q8_0", 128)], INNER)
    h, after = activations(s, 3, INNER), residual(s, 128, 4, 24, dtype=mx.bfloat16)

    def run(shaders: Launcher) -> Any:
        return moe.down(shaders, h, experts, slots, down, after)

    found = traffic(run, "moe_down")
    reads_once(found["records"], 2 * 128 * row_bytes(name, INNER))
    reads_once(found["shared_down"], down.rows.size, 0.94)
    reads_once(found["fn"], after.fn.nbytes, 1.0)


def test_the_end_of_attention() -> None:
    (matrix,) = matrices([("Q8_0", 128)], OUT)
    x, after = activations(1, OUT), residual(1, 128, 4, 24, dtype=mx.bfloat16)
    found = traffic(lambda shaders: dense.expand(shaders, x, matrix, after), "dense_expand")
    reads_once(found["w"], matrix.rows.size)
    reads_once(found["fn"], after.fn.nbytes)


@pytest.mark.parametrize(
    ("n_in", "names"),
    [
        (LATENT, ("Q8_0", "FP8")),
        pytest.param(INNER, ("Q2_K", "MXFP4", "Q4_K"), marks=LATER),
        pytest.param(D, ("IQ2_XXS", "Q6_K", "BF16"), marks=LATER),
    ],
)
def test_prompts_read_whole_lines(n_in: int, names: tuple[str, ...]) -> None:
    """A tile's rows share the lines between them, too."""
    x, weights = activations(9, n_in), matrices([(name, 64) for name in names], n_in)
    found = traffic(lambda s: dense.matmul(s, x, weights, mx.bfloat16), "dense_matmul")
    for i, m in enumerate(weights):
        reads_once(found[f"w{i}"], m.rows.size, 0.98)
    assert found["x"].efficiency == 1
