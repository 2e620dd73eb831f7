"""Preparation of heads and rows, and compressed rows: shaders against the plain operations.

Stored bytes are exactly those of the reference except at rounding ties: sums of float32 in another
order, or a last bit of bfloat16, may land on the other side of a boundary of E4M3 or E2M1. So a
value may lie anywhere between what the reference stores for rows a little smaller and a little
larger (`SLACK`), and few values may differ at all.
"""

from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest

from ds4py.cache import rows as stored
from ds4py.kernels import compress, heads, rope
from ds4py.kernels.build import Launcher
from ds4py.kernels.ops import MlxOps, Ops
from tests.kernels.shaders import DTYPES, LATER, caught, host, launcher, shader_runs

pytestmark = pytest.mark.shader
OPS = cast(Ops, MlxOps())
EPS = 1e-6
SLACK = {mx.float32: 1e-4, mx.bfloat16: 2.0**-5}
FREQS = (1e4 ** -(np.arange(32) / 32)).astype(np.float32)


def normal(seed: int, *shape: int) -> Any:
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


@dataclass(frozen=True)
class Size:
    n_heads: int
    head_dim: int
    latent: int
    index_heads: int


TINY, ODD, FLASH = Size(4, 128, 128, 4), Size(6, 128, 8, 16), Size(64, 512, 1024, 64)
KINDS = {"sliding": (0, 1), "pooled": (16, 1), "indexed": (4, 2)}
ALONE = "rows alone"


def layer(size: Size, kind: str, native: bool = True) -> heads.LayerShape:
    ratio, overlap = KINDS.get(kind, (0, 1))
    n_index = size.index_heads if kind == "indexed" else 0
    attention = stored.RowLayout(size.head_dim - 64, 8, 64, 64)
    index = stored.RowLayout(128, 4, 32, 0)
    return heads.LayerShape(
        0 if kind == ALONE else size.n_heads,
        size.head_dim,
        64,
        size.latent,
        attention.row_bytes if native else size.head_dim,
        native,
        ratio,
        overlap,
        n_index,
        128 if n_index else 0,
        (index.row_bytes if native else 128) if n_index else 0,
    )


class Step:
    """Random projections of n tokens from a position on, and one layer's weights and state."""

    def __init__(self, shape: heads.LayerShape, n: int, start: int, dtype: Any, place: int = 1):
        self.shape, self.n, self.start, self.dtype = shape, n, start, dtype
        self.projected = normal(n, n, shape.n_projected)
        self.queries = normal(n + 1, n, shape.n_queries) * 3 if shape.n_queries else None
        self.table = rope.table(OPS, np.arange(start, start + n), FREQS)
        self.norms = normal(2, shape.head_dim), normal(3, max(shape.index_dim, 64))
        self.apes = [
            None if not width else normal(4, shape.ratio, width)
            for width in (shape.values, shape.index_values)
        ]
        self.histories = [
            self._history(width) for width in (shape.values, shape.index_values) if width
        ]
        n_old = start // shape.ratio if shape.ratio else 0
        self.place = mx.array(np.array([2, place], np.int32))
        self.step = mx.array(np.array([start, n_old], np.int32))
        scale = (shape.index_dim * shape.index_heads) ** -0.5 if shape.index_heads else 0.0
        self.constants = mx.array([EPS, scale])
        layout = stored.RowLayout(shape.head_dim - 64, 8, 64, 64)
        self.layouts = layout, stored.RowLayout(128, 4, 32, 0)

    def _history(self, width: int) -> Any:
        """Of three layers; what lies before the sequence pools to nothing."""
        n = self.shape.overlap * self.shape.ratio - 1
        values = np.array(normal(6, 3, n, width))
        before = max(0, n - self.start)
        values[:, :before, : width // 2] = 0
        values[:, :before, width // 2 :] = -np.inf
        return mx.array(values)

    def pack(self, series: int, factor: float = 1.0) -> Any:
        native, layout = self.shape.native, self.layouts[series]
        return lambda x: stored.pack(OPS, layout, x * factor) if native else x * factor

    @property
    def factors(self) -> tuple[float, float, float]:
        return 1.0, 1 - SLACK[self.dtype], 1 + SLACK[self.dtype]

    def unpack(self, series: int, x: Any) -> Any:
        if not self.shape.native:
            return host([x])[0]
        return np.array(stored.unpack(OPS, self.layouts[series], mx.array(x)))

    def prepare(self, launcher: Launcher) -> heads.Prepared:
        return heads.prepare(
            *(launcher, self.shape, self.projected, self.queries, self.table, self.norms[0]),
            *(*self.apes, self.step, self.constants, self.dtype),
        )

    def prepare_ref(self, factor: float = 1.0) -> heads.Prepared:
        queries = None if self.queries is None else self.queries * factor
        return heads.prepare_ref(
            *(OPS, self.shape, self.projected, queries, self.table, self.norms[0]),
            *(*self.apes, self.start, EPS, self.dtype, self.pack(0, factor), self.pack(1)),
        )

    @property
    def n_new(self) -> int:
        return (self.start + self.n) // self.shape.ratio - self.start // self.shape.ratio

    @property
    def row_table(self) -> Any:
        n_old = self.start // self.shape.ratio
        first = self.shape.ratio * np.arange(n_old, n_old + self.n_new)
        return rope.table(OPS, first, FREQS)

    def rows(self, launcher: Launcher) -> Any:
        fronts = [
            compress.Frontier(history, ape, norm)
            for history, ape, norm in zip(self.histories, self.apes, self.norms, strict=False)
        ]
        return compress.rows(
            *(launcher, self.shape, self.projected, self.n_new, self.row_table, fronts[0]),
            fronts[1] if len(fronts) > 1 else None,
            *(self.place, self.step, self.constants, self.dtype),
        )

    def rows_ref(self, factor: float = 1.0) -> list[Any]:
        prepared, layer = self.prepare_ref(), int(self.place[1])
        values = [prepared.values, prepared.index_values]
        return [
            compress.rows_ref(
                *(OPS, values[i], self.histories[i][layer], self.norms[i], self.row_table),
                *(self.shape.ratio, self.shape.overlap, self.start, EPS, self.dtype),
                self.pack(i, factor),
            )
            for i in range(len(self.histories))
        ]


def same_rows(found: Any, wanted: Any, low: Any, high: Any, differing: float) -> None:
    """Values read from rows: equal, or between those of slightly smaller and larger rows."""
    assert found.shape == wanted.shape
    least, most = np.minimum(low, high), np.maximum(low, high)
    least, most = np.minimum(least, wanted), np.maximum(most, wanted)
    assert ((found >= least - 1e-6) & (found <= most + 1e-6)).all()
    n_other = int((~np.isclose(found, wanted, rtol=1e-5, atol=1e-6)).sum())
    assert n_other <= max(1, differing * wanted.size), f"{n_other} of {wanted.size} values differ"


def compare_prepared(step: Step, found: heads.Prepared) -> None:
    wanted, low, high = (step.prepare_ref(factor) for factor in step.factors)
    tolerance, differing = (2e-5, 1e-3) if step.dtype == mx.float32 else (2**-7, 0.02)
    for name in ("q", "values", "index_values", "index_weights"):
        x, y = getattr(found, name), getattr(wanted, name)
        assert (x is None) == (y is None)
        if x is not None:
            x, y = host([x, y])
            np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance, err_msg=name)
    same_rows(*(step.unpack(0, made.row) for made in (found, wanted, low, high)), differing)
    if found.index_query is not None:
        made = (found, wanted, low, high)
        same_rows(*(step.unpack(1, x.index_query) for x in made), differing)


def compare_rows(step: Step, found: Any) -> None:
    made = [x for x in found if x is not None]
    wanted = zip(*(step.rows_ref(factor) for factor in step.factors), strict=True)
    for series, (x, refs) in enumerate(zip(made, wanted, strict=True)):
        values = [step.unpack(series, ref) for ref in refs]
        same_rows(step.unpack(series, x), *values, 1e-3 if step.dtype == mx.float32 else 0.02)


CASES = [
    (TINY, "indexed", 5, 30),
    (TINY, "indexed", 1, 3),  # the first row, whose window before it does not exist
    (TINY, "indexed", 1, 7),
    (TINY, "pooled", 1, 15),
    (TINY, "pooled", 33, 0),
    (TINY, "sliding", 1, 0),
    (TINY, ALONE, 1, 30),
    (ODD, ALONE, 9, -1),
    (ODD, "indexed", 9, 2),
    (ODD, "pooled", 40, 8),
]


@pytest.mark.parametrize(("size", "kind", "n", "start"), CASES)
@pytest.mark.parametrize("native", [True, pytest.param(False, marks=LATER)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_prepare_and_rows(
    size: Size, kind: str, n: int, start: int, native: bool, dtype: Any
) -> None:
    step = Step(layer(size, kind, native), n, start, dtype)
    for found in shader_runs(step.prepare):
        compare_prepared(step, found)
    if step.shape.ratio:
        for found in shader_runs(step.rows):
            compare_rows(step, found)


@LATER
@pytest.mark.parametrize("kind", KINDS)
def test_prepare_and_rows_of_flash(kind: str) -> None:
    step = Step(layer(FLASH, kind), 2, 30, mx.bfloat16)
    for found in shader_runs(step.prepare):
        compare_prepared(step, found)
    if step.shape.ratio:
        for found in shader_runs(step.rows):
            compare_rows(step, found)


def test_unfold_is_the_rotation() -> None:
    positions = np.array([0, 5, 1000])
    made = rope.unfold(OPS, rope.table(OPS, positions, FREQS), 128)
    wanted = rope.rotation(OPS, positions, FREQS, 128)
    for x, y in zip(host(made), host(wanted), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_row_does_not_depend_on_the_others() -> None:
    step = Step(layer(TINY, "indexed"), 8, 30, mx.bfloat16)
    whole = step.prepare(launcher())
    part = Step(step.shape, 3, 32, mx.bfloat16)
    part.apes, part.norms = step.apes, step.norms
    part.projected, part.queries = step.projected[2:5], step.queries[2:5]
    for x, y in zip(host(part.prepare(launcher())), host(whole), strict=True):
        np.testing.assert_array_equal(x, y[2:5])


@LATER
@pytest.mark.parametrize(
    "change",
    [
        ("rotate_pair(float2 x, float2 turn) {\n  return float2(x.x * turn.x - x.y * turn.y",
         "rotate_pair(float2 x, float2 turn) {\n  return float2(x.x * turn.x + x.y * turn.y"),
        ("(as_type<uint>(x) + 0x7fffffu) >> 23", "as_type<uint>(x) >> 23"),
        ("return rint(x / step) * step", "return floor(x / step) * step"),
        ("(bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16", "bits >> 16"),
        ("uint(magnitude * 512.0f)", "0u"),
        ("uint(step[0] + int(token)) % ", "uint(token) % "),
        ("(lane & bit) ? other - x.at[i] : x.at[i] + other", "x.at[i] + other"),
        ("distance < FP4_BLOCK / 2", "distance < FP4_BLOCK / 4"),
        ("columns[WEIGHTS_AT + head])) * constants[1]", "columns[WEIGHTS_AT + head]))"),
    ],
)  # fmt: skip
def test_prepare_planted(change: tuple[str, str]) -> None:
    step = Step(layer(TINY, "indexed"), 5, 30, mx.float32)
    step.projected[0, TINY.latent : TINY.latent + 40] *= 1e-3  # subnormal codes
    caught(
        lambda launcher: compare_prepared(step, step.prepare(launcher)), {"heads_prepare": change}
    )


@LATER
@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("pooled", ("float2 weight = exp(score - higher)", "float2 weight = exp(score)")),
        ("pooled", ("sum = sum * keep + weight * value", "sum = sum + weight * value")),
        ("indexed", ("(C - 1 - window) * D + channel", "window * D + channel")),
        ("indexed", ("RATIO * (number - window) + i", "RATIO * number + i")),
        ("indexed", ("size_t(place[1]) * KEPT * VALUES", "size_t(place[0]) * KEPT * VALUES")),
        ("pooled", ("HD / 64; i++) sum += square_sums[i]", "1; i++) sum += square_sums[i]")),
        ("indexed", ("row[d / 2 + 2 * i + lane / 16]", "row[d / 2 + 2 * i]")),
        ("indexed", ("| (e2m1_encode(y.y) << 4)", "| (e2m1_encode(y.x) << 4)")),
    ],
)  # fmt: skip
def test_rows_planted(kind: str, change: tuple[str, str]) -> None:
    step = Step(layer(TINY, kind), 5, 30, mx.float32)
    caught(lambda launcher: compare_rows(step, step.rows(launcher)), {"compress_rows": change})
