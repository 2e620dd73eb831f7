"""Hyper-connection shaders against the plain operations."""

from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest

from ds4py.kernels import hyper
from ds4py.kernels.build import Launcher
from ds4py.kernels.formats import unpack
from ds4py.kernels.ops import MlxOps, Ops
from tests.kernels.packed import random_matrix
from tests.kernels.shaders import DTYPES, LATER, caught, close, host

pytestmark = pytest.mark.shader
OPS = cast(Ops, MlxOps())
EPS = 1e-6


def normal(seed: int, *shape: int) -> Any:
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def weights(h: int, d: int, rows: int) -> hyper.HyperWeights:
    fn = OPS.pack([(np.array(normal(1, rows, h * d)) / 16, mx.float32)])
    return hyper.HyperWeights(fn, normal(2, rows), normal(3, rows), EPS, 2 * EPS)


class Pre:
    """One case of `pre`, its products split into parts by hand."""

    def __init__(self, n: int, d: int, iters: int, parts: int, dtype: Any, h: int = 4):
        self.streams = normal(n, n, h, d).astype(dtype)
        self.weights = weights(h, d, 2 * h + h * h if iters else h)
        self.norm, self.iters = normal(4, d), iters
        shares = np.random.default_rng(5).dirichlet(np.ones(parts))[:, None, None]
        whole = np.array(hyper.products(OPS, self.streams, self.weights))
        self.partials = mx.array((whole * shares).astype(np.float32))

    def run(self, launcher: Launcher) -> Any:
        w = self.weights
        epsilons = mx.array([w.norm_eps, w.eps, 3 * EPS])
        return hyper.pre(
            launcher, self.streams, self.partials, w.base, w.scale, self.norm, epsilons, self.iters
        )

    def expected(self) -> Any:
        return hyper.pre_ref(OPS, self.streams, self.weights, self.norm, self.iters, 3 * EPS)


@pytest.mark.parametrize(
    ("n", "d", "iters", "parts"),
    [(1, 256, 20, 4), (3, 256, 6, 1), (2, 32, 20, 3), (1, 256, 0, 4), (9, 8, 1, 2)],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_pre(n: int, d: int, iters: int, parts: int, dtype: Any) -> None:
    """bfloat16: a sum on a rounding boundary moves the collapsed row by a step of 2^-8, twice."""
    case = Pre(n, d, iters, parts, dtype)
    tolerance = 2e-5 if dtype == mx.float32 else 2**-7
    close(case.run, case.expected(), tolerance, tolerance)


@pytest.mark.parametrize("h", [1, 2])
def test_pre_with_fewer_streams(h: int) -> None:
    case = Pre(2, 64, 5, 2, mx.float32, h)
    close(case.run, case.expected(), 2e-5, 2e-5)


@LATER
@pytest.mark.parametrize("iters", [20, 0])
def test_pre_of_flash(iters: int) -> None:
    case = Pre(2, 4096, iters, 64, mx.bfloat16)
    close(case.run, case.expected(), 2**-7, 2**-7)


@LATER
@pytest.mark.parametrize(
    "change",
    [
        ("for (int i = 1; i < ITERS; i++)", "for (int i = 2; i < ITERS; i++)"),
        ("sum_over(c, column, LOG_H) + eps);\n  for", "sum_over(c, 1, LOG_H) + eps);\n  for"),
        ("part += HYPER_SIMDGROUPS", "part += 2 * HYPER_SIMDGROUPS"),
        ("weights[h] = simd_shuffle(gate, h) + epsilons[1]", "weights[h] = simd_shuffle(gate, h)"),
        ("2.0f * gate", "gate"),
        ("float(D) + epsilons[2]", "float(D + 1)"),
    ],
)  # fmt: skip
def test_pre_planted(change: tuple[str, str]) -> None:
    case = Pre(2, 256, 3, 9, mx.float32)
    case.weights.base[:] -= 4  # so that the epsilons count
    case.weights = hyper.HyperWeights(
        case.weights.fn, case.weights.base, case.weights.scale, 1e-6, 1e-2
    )

    def check(launcher: Launcher) -> None:
        for x, y in zip(host(case.run(launcher)), host(case.expected()), strict=True):
            np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5)

    caught(check, {"hyper_pre": change})


class Embed:
    """One case of `embed`; table: its format."""

    def __init__(self, n: int, d: int, rows: int, dtype: Any, table: str, h: int = 4):
        rng = np.random.default_rng(n)
        self.tokens = mx.array(rng.integers(0, 50, n).astype(np.int32))
        self.table = random_matrix(table, 50, d, rng)
        self.weights, self.dtype, self.h = weights(h, d, rows), dtype, h

    def run(self, launcher: Launcher) -> Any:
        fn = self.weights.fn.arrays[0]
        streams, partials = hyper.embed(launcher, self.tokens, self.table, fn, self.h, self.dtype)
        return streams, partials.sum(0, keepdims=True)

    def expected(self) -> Any:
        rows = np.array(unpack(self.table.format, np.array(self.table.rows), self.table.n_in))
        table = mx.array(rows).astype(self.dtype)
        return hyper.embed_ref(OPS, self.tokens, table, self.weights, self.h)


@pytest.mark.parametrize(
    ("n", "d", "rows"), [(1, 256, 24), (8, 256, 24), (9, 32, 24), (17, 104, 4), (3, 8, 24)]
)
@pytest.mark.parametrize("table", ["F32", *(pytest.param(f, marks=LATER) for f in ("BF16", "F16"))])
def test_embed(n: int, d: int, rows: int, table: str) -> None:
    dtype = mx.float32 if table == "F32" else mx.bfloat16
    case = Embed(n, d, rows, dtype, table)
    close(case.run, case.expected(), 2e-5, 1e-4)


@pytest.mark.parametrize(
    "table",
    [
        "Q8_0",
        *(
            pytest.param(f, marks=LATER)
            for f in ("Q2_K", "Q4_K", "Q6_K", "IQ2_XXS", "MXFP4", "FP8")
        ),
    ],
)
def test_embed_of_blocks(table: str) -> None:
    case = Embed(5, 768, 24, mx.float32, table)
    close(case.run, case.expected(), 2e-5, 1e-4)


@LATER
def test_embed_of_flash() -> None:
    case = Embed(2, 4096, 24, mx.bfloat16, "BF16")
    close(case.run, case.expected(), 2e-5, 1e-3)


@LATER
@pytest.mark.parametrize(
    "change",
    [
        ("h < H; h++) sum +=", "h < H - 1; h++) sum +="),
        ("float2(float(H))", "float2(1.0f)"),
        ("+ first_row + row) * (R + 1)", "+ row) * (R + 1)"),
        ("i / OCTETS < n_rows", "i / OCTETS <= n_rows"),
        ("channel / 256 * 256", "channel / 512 * 512"),
        ("(begin >> 2), uint(begin & 3)", "(begin >> 2), uint(0)"),
        (": o.hi[j - 4]) * o.scale", ": o.lo[j - 4]) * o.scale"),
    ],
)
def test_embed_planted(change: tuple[str, str]) -> None:
    cases = [Embed(9, 96, 24, mx.float32, "F32"), Embed(9, 352, 24, mx.float32, "Q8_0")]

    def check(launcher: Launcher) -> None:
        for case in cases:
            for x, y in zip(host(case.run(launcher)), host(case.expected()), strict=True):
                np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-4)

    caught(check, {"hyper_embed": change})
