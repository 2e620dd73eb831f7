"""The shaders that read dense weights against plain arithmetic in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import mlx.core as mx
import numpy as np
import pytest

from ds4py.kernels import dense
from ds4py.kernels.build import Launcher
from ds4py.kernels.dense import Residual
from ds4py.kernels.formats import PackedMatrix
from ds4py.kernels.host import HostOps
from ds4py.kernels.ops import MlxOps, Ops
from tests.kernels.near import bugs, compare, near, variants
from tests.kernels.packed import random_matrix
from tests.kernels.shaders import LATER, caught, launcher

pytestmark = pytest.mark.shader

EXACT, MLX = cast(Ops, HostOps(np.float64)), cast(Ops, MlxOps())
FLOAT32 = 2e-6
"""Of the largest result: float32 sums in another order than float64's."""
BFLOAT16 = 2**-8
"""Of the largest result: one rounding of it, and those of inputs that land on the other side."""

Parts = Sequence[tuple[str, int]]
ALL: Parts = (
    ("Q8_0", 37), ("Q6_K", 5), ("Q4_K", 12), ("Q2_K", 9),
    ("IQ2_XXS", 33), ("MXFP4", 7), ("FP8", 8), ("BF16", 1),
)  # fmt: skip
PLAIN: Parts = (("F32", 6), ("Q8_0", 3), ("F16", 11), ("MXFP4", 17), ("BF16", 5), ("FP8", 9))


def normal(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def matrices(parts: Parts, n_in: int) -> list[PackedMatrix]:
    rng = np.random.default_rng(7)
    return [random_matrix(name, n, n_in, rng) for name, n in parts]


class Projection(NamedTuple):
    """One launch of dense_project."""

    rows: int
    n_in: int
    parts: Parts
    norm: bool = False
    groups: int = 1
    offset: int = 0

    def inputs(self) -> Any:
        """Columns outside the input are NaN: nothing may read them."""
        width = self.groups * self.n_in
        x = np.full((self.rows, self.offset + width + 4), np.nan, np.float32)
        x[:, self.offset : self.offset + width] = normal(self.rows, width, seed=1)
        return x

    def arguments(self, array: Any) -> tuple[Any, ...]:
        weight = array(normal(self.n_in, seed=3)) if self.norm else None
        stacked = [(name, self.groups * n) for name, n in self.parts]
        rows = matrices(stacked, self.n_in)
        dtype = np.float32 if array is np.array else mx.float32
        return rows, dtype, weight, 1e-6, self.groups, self.offset

    def run(self, shaders: Launcher, x: Any) -> Any:
        return dense.project(shaders, mx.array(x), *self.arguments(mx.array))

    def reference(self, x: Any) -> Any:
        return dense.project_ref(EXACT, x, *self.arguments(np.array))


PROJECTIONS = {
    "every format": Projection(1, 512, ALL),
    "norm": Projection(1, 128, (("Q8_0", 512), ("F16", 128)), norm=True, offset=64),
    "groups": Projection(2, 256, (("Q8_0", 65),), groups=2),
    "one row of 32": Projection(1, 32, (("MXFP4", 1),)),
    "norm of five rows": Projection(5, 1024, (("Q8_0", 33), ("FP8", 8)), norm=True),
    "not whole units": Projection(1, 320, PLAIN),
    "eight rows": Projection(8, 512, ALL[:4]),
    "three rows in parts": Projection(3, 2368, PLAIN[3:]),
    "rows longer than a burst": Projection(1, 8192, (("Q8_0", 9), ("FP8", 3), ("F32", 2))),
    "two rows of V4-Flash": Projection(2, 4096, (("IQ2_XXS", 18), ("MXFP4", 9), ("Q6_K", 5))),
}


@variants(PROJECTIONS, 4)
def test_projection(case: Projection) -> None:
    x = case.inputs()
    near(lambda shaders: [case.run(shaders, x)], [case.reference(x)], FLOAT32)


@pytest.mark.parametrize(("s", "function"), [(3, dense.project), (34, dense.matmul)])
def test_products_in_bfloat16(s: int, function: Any) -> None:
    """Inputs are rounded before the products, whose sums are not, unless the result is asked for
    in bfloat16."""
    x, norm = mx.array(normal(s, 256)).astype(mx.bfloat16), mx.array(normal(256, seed=3))
    weights = matrices((("Q8_0", 12), ("IQ2_XXS", 8)), 256)
    packed = [lazy(m) for m in weights]
    want = dense.project_ref(MLX, x, packed, mx.bfloat16)
    near(lambda shaders: [function(shaders, x, weights, mx.bfloat16)], [want], FLOAT32)
    want = dense.project_ref(MLX, x.astype(mx.float32), packed, mx.bfloat16, norm)
    how = {"norm": norm, "result": mx.bfloat16}
    near(
        lambda shaders: [function(shaders, x, weights, mx.bfloat16, **how)],
        [want.astype(mx.bfloat16)],
        BFLOAT16,
    )


def lazy(m: PackedMatrix) -> PackedMatrix:
    return PackedMatrix(m.format, mx.array(m.rows), m.n_in)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    """Eight rows stage their activations in parts and read the weights in smaller pieces."""
    shaders, x = launcher(), normal(8, 1280)
    weights = matrices((("Q8_0", 33), ("Q2_K", 6), ("MXFP4", 5)), 1280)
    norm = mx.array(normal(1280, seed=3))
    whole = dense.project(shaders, mx.array(x), weights, mx.float32, norm)
    for first, last in ((0, 1), (5, 6), (2, 4), (3, 8)):
        part = dense.project(shaders, mx.array(x[first:last]), weights, mx.float32, norm)
        compare([part], [whole[first:last]], 0)


def residual(s: int, d: int, h: int, r: int, array: Any = mx.array, dtype: Any = None) -> Residual:
    streams = array(normal(s, h, d, seed=4))
    if dtype is not None:
        streams = streams.astype(dtype)
    gates, fn = normal(s, h + h * h, seed=5), normal(r, h * d, seed=6) / 16
    return Residual(streams, array(gates), array(fn))


@pytest.mark.parametrize(
    ("s", "n_in", "d", "r", "name"),
    [
        (1, 128, 256, 24, "Q8_0"),
        pytest.param(2, 512, 80, 4, "IQ2_XXS", marks=LATER),
        pytest.param(8, 1280, 256, 24, "FP8", marks=LATER),
    ],
)
def test_expand(s: int, n_in: int, d: int, r: int, name: str) -> None:
    x, (matrix,) = normal(s, n_in, seed=1), matrices([(name, d)], n_in)
    want = dense.expand_ref(EXACT, x, matrix, residual(s, d, 4, r, np.array))
    after = residual(s, d, 4, r)
    near(lambda shaders: dense.expand(shaders, mx.array(x), matrix, after), want, FLOAT32)
    if s > 1:
        shaders = launcher()
        whole = dense.expand(shaders, mx.array(x), matrix, after)
        one = Residual(after.streams[1:2], after.gates[1:2], after.fn)
        part = dense.expand(shaders, mx.array(x[1:2]), matrix, one)
        compare(part, [whole[0][1:2], whole[1][:, 1:2]], 0)


def test_expand_in_bfloat16() -> None:
    """The partial sums are those of the streams as stored; both are compared by themselves. fn is
    read in the type that it has."""
    x, (matrix,) = mx.array(normal(2, 128)), matrices([("Q8_0", 256)], 128)
    after = residual(2, 256, 4, 24, dtype=mx.bfloat16)
    after = Residual(after.streams, after.gates, after.fn.astype(mx.bfloat16))
    want = dense.expand_ref(MLX, x, lazy(matrix), after)
    near(lambda shaders: dense.expand(shaders, x, matrix, after), want, BFLOAT16)
    terms = mx.array(normal(2, 3, 256, seed=1))
    after = Residual(after.streams, after.gates, after.fn.astype(mx.float16))
    want = dense.add_ref(MLX, terms.sum(1), after)
    near(lambda shaders: dense.add(shaders, terms, after), want, BFLOAT16)


DECODERS = [
    ("F32", "as_type<float>(words[w + 1])", "as_type<float>(words[w])"),
    ("F16", "c = as_type<half2>(words[w + 2])", "c = as_type<half2>(words[w])"),
    ("BF16", "as_type<float>(d & 0xffff0000u)", "as_type<float>(d)"),
    ("FP8", "129 * (l >> 4)", "128 * (l >> 4)"),
    ("Q8_0", "block + 2 + 8 * quarter", "block + 8 * quarter"),
    ("MXFP4", "(4 * (quarter >> 1))", "(4 * (quarter & 1))"),
    ("Q2_K", "float(scale >> 4)", "float(scale & 15)"),
    ("Q4_K", "((a >> 2) & 48)", "((a >> 2) & 16)"),
    ("Q6_K", "unsigned_bytes(low.y | high.y) - 32.0f", "unsigned_bytes(low.y | high.y)"),
    ("IQ2_XXS", "(popcount(signs) & 1) << 7", "0"),
    ("IQ2_XXS", "8 + 17 * b + (b >> 1)", "8 + 17 * b"),
]


@bugs("name right wrong", DECODERS, 2)
def test_a_wrong_decoder_is_noticed(name: str, right: str, wrong: str) -> None:
    case = Projection(1, 256, ((name, 3),))
    x = case.inputs()
    want = [case.reference(x)]
    caught(
        lambda shaders: compare([case.run(shaders, x)], want, FLOAT32),
        {"dense_project": (right, wrong)},
    )


BUGS = [
    ("norm", "v * inverse_rms[s] * weight", "v * weight"),
    ("groups", "column = group * N0", "column = 0"),
    ("every format", "tile -= n_tiles", "tile = 0"),
    ("every format", "if (r < n_rows) y[", "y["),
    ("three rows in parts", "p0 += PIECE", "p0 += 2 * PIECE"),
    ("three rows in parts", "own[place(e.begin, q, at)] = carried[m]", "(void)at"),
    ("groups", "simdgroup_barrier(mem_flags::mem_threadgroup);\n            incoming", "incoming"),
    ("one row of 32", "if (k >= p1) break;", ""),
]


@bugs("name right wrong", BUGS, 2)
def test_a_wrong_projection_is_noticed(name: str, right: str, wrong: str) -> None:
    case = PROJECTIONS[name]
    x = case.inputs()
    want = [case.reference(x)]
    caught(
        lambda shaders: compare([case.run(shaders, x)], want, FLOAT32),
        {"dense_project": (right, wrong)},
    )


@bugs(
    "right wrong",
    [
        ("H + j * H + k]", "H + k * H + j]"),
        ("PAIRS * (R + 1)", "PAIRS * R"),
        ("= float(rounded);", "= 0.5f * sum;"),
        ("partials + first / PART * STRIDE", "partials + STRIDE"),
        ("part * stride", "part"),
        ("threadgroup_barrier(mem_flags::mem_threadgroup);\n  // A simd", "// A simd"),
    ],
    1,
)
def test_a_wrong_expansion_is_noticed(right: str, wrong: str) -> None:
    x, (matrix,) = normal(1, 128, seed=1), matrices([("Q8_0", 256)], 128)
    want = dense.expand_ref(EXACT, x, matrix, residual(1, 256, 4, 24, np.array))
    after = residual(1, 256, 4, 24)
    caught(
        lambda shaders: compare(dense.expand(shaders, mx.array(x), matrix, after), want, FLOAT32),
        {"dense_expand": (right, wrong)},
    )


PROMPTS = {
    "one position": Projection(1, 64, (("Q8_0", 4),)),
    "blocks": Projection(40, 512, (("Q8_0", 66), ("Q6_K", 2), ("IQ2_XXS", 4))),
    "not whole units": Projection(70, 160, (("F32", 6), ("MXFP4", 16), ("FP8", 8))),
    "norm": Projection(33, 128, (("Q8_0", 20),), norm=True, offset=64),
    "groups": Projection(9, 256, (("FP8", 68),), groups=2),
}


def run_matmul(case: Projection, x: Any, shaders: Launcher) -> list[Any]:
    return [dense.matmul(shaders, mx.array(x), *case.arguments(mx.array))]


@variants(PROMPTS, 2)
def test_matrix_product(case: Projection) -> None:
    x = case.inputs()
    near(lambda shaders: run_matmul(case, x, shaders), [case.reference(x)], FLOAT32)


def test_a_position_does_not_depend_on_the_prompt() -> None:
    """Nor, but for the order of float32 sums, on whether it came with a prompt or alone."""
    shaders, x = launcher(), normal(70, 512)
    weights = matrices((("Q8_0", 36), ("Q4_K", 4)), 512)
    whole = dense.matmul(shaders, mx.array(x), weights, mx.float32)
    for first, last in ((0, 1), (30, 50), (69, 70)):
        part = dense.matmul(shaders, mx.array(x[first:last]), weights, mx.float32)
        compare([part], [whole[first:last]], 0)
    alone = dense.project(shaders, mx.array(x[:8]), weights, mx.float32)
    compare([alone], [whole[:8]], FLOAT32)


@pytest.mark.parametrize(("s", "n_terms", "d"), [(9, 1, 256), (17, 3, 80), (1, 7, 32)])
def test_add(s: int, n_terms: int, d: int) -> None:
    terms, after = normal(s, n_terms, d, seed=1), residual(s, d, 4, 24)
    want = dense.add_ref(EXACT, terms.astype(np.float64).sum(1), residual(s, d, 4, 24, np.array))
    near(lambda shaders: dense.add(shaders, mx.array(terms), after), want, FLOAT32)


@bugs(
    "name right wrong",
    [
        ("norm", "sums[i][j], a, b[j], sums[i][j]", "sums[i][j], a, b[0], sums[i][j]"),
        ("norm", "uint(k % stream::PIECE) / 8", "uint(k0 % stream::PIECE) / 8"),
        ("blocks", "(begin >> 4)] = carried[j];\n      }", "(begin >> 4)] = head[j];\n      }"),
        ("blocks", "ROOM / 16] = head[j]", "ROOM / 16] = carried[j]"),
        ("norm", "if (row < n_x && k < K) v", "v"),
        ("norm", "octet_index / 4 != k0 / BK % 2", "octet_index / 4 != 0"),
        ("norm", "threadgroup_barrier(mem_flags::mem_threadgroup);\n    MLX_MTL", "MLX_MTL"),
        ("norm", "PIECE == 0) threadgroup_barrier", "PIECE < 0) threadgroup_barrier"),
        ("not whole units", "position + r) * RESULT", "r) * RESULT"),
    ],
    1,
)
def test_a_wrong_matrix_product_is_noticed(name: str, right: str, wrong: str) -> None:
    case = PROMPTS[name]
    x = case.inputs()
    want = [case.reference(x)]
    caught(
        lambda shaders: compare(run_matmul(case, x, shaders), want, FLOAT32),
        {"dense_matmul": (right, wrong)},
    )


@bugs(
    "right wrong",
    [
        ("j < TERMS", "j < 1"),
        ("+ position * (R + 1), stride", ", stride"),
        ("streams + before", "streams"),
    ],
    1,
)
def test_a_wrong_addition_is_noticed(right: str, wrong: str) -> None:
    terms, after = normal(9, 2, 64, seed=1), residual(9, 64, 4, 24)
    want = dense.add_ref(EXACT, terms.sum(1), residual(9, 64, 4, 24, np.array))
    caught(
        lambda shaders: compare(dense.add(shaders, mx.array(terms), after), want, FLOAT32),
        {"dense_add": (right, wrong)},
    )
