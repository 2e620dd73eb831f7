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
from tests.kernels.test_dense import matrices, residual
from tests.kernels.test_moe import some_experts

pytestmark = pytest.mark.shader

D, INNER, LATENT, OUT = 4096, 2048, 1024, 8192
"""Hidden width, an expert's width, query latent, and the input of the last projection."""


def activations(*shape: int) -> Any:
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    return mx.array(x).astype(mx.bfloat16)


def reads_once(found: Any, needed: int, most: float = 1.03, lines: float = 0.9) -> None:
    assert needed == found.touched
    assert found.loaded <= most * needed
    assert found.efficiency >= lines


# One tile of the experts' kernels, and of the others 128 rows.
LENGTHS = [
    (D, ("Q8_0", "IQ2_XXS", "Q4_K", "MXFP4", "FP8", "F16", "Q6_K", "F32")),
    (LATENT, ("Q8_0", "BF16")),
    (OUT, ("Q8_0", "FP8")),
]


def project(n_rows: int, n_in: int, names: tuple[str, ...]) -> Any:
    """The traffic, and the matrices."""
    x, weights = activations(n_rows, n_in), matrices([(name, 128) for name in names], n_in)

    def run(shaders: Launcher) -> Any:
        return dense.project(shaders, x, weights, mx.bfloat16)

    return traffic(run, "dense_project"), weights


@pytest.mark.parametrize(("n_in", "names"), LENGTHS)
def test_one_row(n_in: int, names: tuple[str, ...]) -> None:
    found, weights = project(1, n_in, names)
    for i, m in enumerate(weights):
        reads_once(found[f"w{i}"], m.rows.size)
    assert found["x"].efficiency == 1


def test_eight_rows_read_the_weights_once() -> None:
    """In pieces of 512 values, whose ends share a line with the next piece."""
    found, weights = project(8, D, ("Q8_0", "FP8", "BF16"))
    for i, m in enumerate(weights):
        reads_once(found[f"w{i}"], m.rows.size, lines=0.75)


@pytest.mark.parametrize("n_rows", [1, 4])
def test_experts(n_rows: int) -> None:
    """All rows choose the same two of three experts, whose bytes are then read once."""
    slots, weights = mx.array([[2, 0]] * n_rows, mx.int32), mx.ones((n_rows, 2))
    lines = 0.9 if n_rows == 1 else 0.75
    experts = some_experts(3, D, 64, "IQ2_XXS", "F16")
    gate, up = matrices([("Q8_0", 64)] * 2, D)
    x = activations(n_rows, D)

    def gate_up(shaders: Launcher) -> Any:
        return moe.gate_up(shaders, x, experts, slots, weights, (gate, up), 10.0)

    found = traffic(gate_up, "moe_gate_up")
    reads_once(found["records"], 2 * 2 * 64 * row_bytes("IQ2_XXS", D), lines=lines)
    reads_once(found["shared_gate"], gate.rows.size, lines=lines)

    experts = some_experts(3, 128, INNER, "Q8_0", "Q2_K")
    (down,) = matrices([("Q8_0", 128)], INNER)
    h, after = activations(n_rows, 3, INNER), residual(n_rows, 128, 4, 24, dtype=mx.bfloat16)

    def whole(shaders: Launcher) -> Any:
        return moe.down(shaders, h, experts, slots, down, after)

    found = traffic(whole, "moe_down")
    reads_once(found["records"], 2 * 128 * row_bytes("Q2_K", INNER), lines=lines)
    reads_once(found["shared_down"], down.rows.size, lines=lines)
    reads_once(found["fn"], after.fn.nbytes)


def test_the_end_of_attention() -> None:
    (matrix,) = matrices([("Q8_0", 128)], OUT)
    x, after = activations(1, OUT), residual(1, 128, 4, 24, dtype=mx.bfloat16)
    found = traffic(lambda shaders: dense.expand(shaders, x, matrix, after), "dense_expand")
    reads_once(found["w"], matrix.rows.size)
    reads_once(found["fn"], after.fn.nbytes)


def test_a_prompt_reads_each_tile_of_weights_once_per_tile_of_positions() -> None:
    """40 positions are one tile; a row's neighbours in a line come with the next 32 inputs."""
    x, weights = activations(40, LATENT), matrices([("Q8_0", 128)], LATENT)
    found = traffic(lambda s: dense.matmul(s, x, weights, mx.bfloat16), "dense_matmul")
    assert found["w0"].touched == weights[0].rows.size
    assert found["w0"].loaded <= 2 * weights[0].rows.size
