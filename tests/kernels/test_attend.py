"""Attention over stored rows: shaders against the plain operations."""

from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest

from ds4py.cache import rows as stored
from ds4py.kernels import attend, rope
from ds4py.kernels.build import Launcher
from ds4py.kernels.ops import MlxOps, Ops
from tests.kernels.near import traffic
from tests.kernels.shaders import DTYPES, LATER, caught, close, host, launcher
from tests.kernels.test_heads import FLASH, FREQS, ODD, TINY, Size, layer, normal

pytestmark = pytest.mark.shader
OPS = cast(Ops, MlxOps())


class Case:
    """n queries from a position on, over a window of w rows and n_old + n_new compressed ones.

    Whatever a query may not see is NaN: stale rows, rows before the sequence, ids past the valid.
    """

    def __init__(
        self,
        size: Size,
        n: int,
        start: int,
        w: int,
        ratio: int = 4,
        k: int = 0,
        dtype: Any = mx.float32,
        native: bool = True,
    ):
        self.shape = layer(size, "indexed" if ratio else "sliding", native)
        self.n, self.start, self.w, self.k, self.dtype = n, start, w, k, dtype
        hd, self.rng = size.head_dim, np.random.default_rng(n + start)
        self.layout = stored.RowLayout(hd - 64, 8, 64, 64)
        self.q = normal(1, n, size.n_heads, hd).astype(dtype) * 3
        self.sink, positions = normal(2, size.n_heads), np.arange(start, start + n)
        self.table = rope.table(OPS, positions, FREQS)
        self.n_old = start // ratio if ratio else 0
        self.n_new = (start + n) // ratio - self.n_old if ratio else 0
        self.visible = (positions + 1) // ratio if ratio else np.zeros(n)
        recent = normal(3, 3, w - 1, hd)
        recent[:, : max(0, w - 1 - start)] = np.nan
        pooled = normal(4, 2, self.n_old + 5, hd)
        pooled[:, self.n_old :] = np.nan
        pooled[0] = np.nan  # another layer's
        self.recent, self.pooled = self.store(recent), self.store(pooled)
        self.delta = self.store(normal(5, n, hd))
        self.new = self.store(normal(6, self.n_new, hd)) if self.n_new else None
        self.ids = self.choose() if k else None

    def store(self, rows: Any) -> Any:
        """As bytes; NaN stays NaN in scales and tail."""
        rows = rows.astype(self.dtype)
        return stored.pack(OPS, self.layout, rows) if self.shape.native else rows

    def load(self, rows: Any) -> Any:
        if not self.shape.native:
            return rows
        return stored.unpack(OPS, self.layout, rows).astype(self.dtype)

    def choose(self) -> Any:
        """k ascending rows of those a query sees, the rest an id that is out of bounds."""
        ids = np.full((self.n, self.k), 10**6, np.int32)
        for query, visible in enumerate(self.visible):
            chosen = self.rng.permutation(int(visible))[: self.k]
            ids[query, : len(chosen)] = np.sort(chosen)
        return mx.array(ids)

    def run(self, launcher: Launcher) -> Any:
        rows = attend.StoredRows(
            *(self.recent, self.delta, self.pooled if self.n_old else None, self.new),
            self.n_old + self.n_new,
            mx.array(self.visible.astype(np.int32)),
            mx.array(np.array([2, 1], np.int32)),
            mx.array(np.array([self.start, self.n_old], np.int32)),
        )
        return [attend.rows(launcher, self.shape, self.q, rows, self.ids, self.sink, self.table)]

    def expected(self) -> Any:
        """Query by query, of the rows it sees and no others."""
        recent = mx.concatenate([self.load(self.recent[2]), self.load(self.delta)])
        pooled = self.load(self.pooled[1, : self.n_old])
        if self.new is not None:
            pooled = mx.concatenate([pooled, self.load(self.new)])
        out = []
        for i in range(self.n):
            first = max(0, self.w - 1 - (self.start + i))
            seen = [recent[i + first : i + self.w]]
            visible = int(self.visible[i])
            if self.ids is not None:
                seen.append(pooled[self.ids[i, : min(self.k, visible)]])
            else:
                seen.append(pooled[:visible])
            rows = mx.concatenate(seen)[None, None]
            valid = mx.ones(rows.shape[:3], mx.bool_)
            out.append(
                attend.rows_ref(
                    OPS, self.q[i : i + 1], [(rows, valid)], self.sink, self.table[i : i + 1]
                )
            )
        return [mx.concatenate(out)]


CASES: dict[str, dict[str, Any]] = {
    "window not yet full": {"size": TINY, "n": 3, "start": 0, "w": 64, "ratio": 0},
    "first position of a full window": {"size": TINY, "n": 1, "start": 63, "w": 64, "ratio": 0},
    "no compressed row yet": {"size": TINY, "n": 2, "start": 1, "w": 64},
    "all of few": {"size": TINY, "n": 5, "start": 30, "w": 64},
    "all of many, in parts": {"size": TINY, "n": 1, "start": 17_000, "w": 24},
    "chosen": {"size": ODD, "n": 8, "start": 100, "w": 24, "k": 8},
    "fewer visible than chosen": {"size": TINY, "n": 4, "start": 17, "w": 64, "k": 32},
    "a chunk": {"size": TINY, "n": 40, "start": 50, "w": 64, "k": 16},
    "pooled": {"size": ODD, "n": 2, "start": 126, "w": 24, "ratio": 16},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention(name: str, dtype: Any) -> None:
    case = Case(**CASES[name], dtype=dtype)
    tolerance = 2e-5 if dtype == mx.float32 else 2**-7
    close(case.run, case.expected(), tolerance, tolerance)


@LATER
@pytest.mark.parametrize("name", ["all of few", "chosen", "a chunk"])
def test_attention_over_float_rows(name: str) -> None:
    case = Case(**CASES[name], native=False)
    close(case.run, case.expected(), 2e-5, 2e-5)


@LATER
@pytest.mark.parametrize("k", [0, 512])
def test_attention_of_flash(k: int) -> None:
    case = Case(FLASH, 1, 4000 if k else 700, 128, 4, k, mx.bfloat16)
    close(case.run, case.expected(), 2**-7, 2**-7)


def test_a_query_does_not_depend_on_the_others() -> None:
    """Also where one more row makes the parts larger."""
    start = 4 * (attend.MORE_ROWS - 24) - 5
    whole = Case(TINY, 8, start, 24)
    out = host(whole.run(launcher()))[0]
    pooled = mx.concatenate([whole.pooled[1, : whole.n_old], whole.new])
    for i in (0, 3, 7):
        one = Case(TINY, 1, start + i, 24)
        before = mx.broadcast_to(whole.delta[:i], (3, i, whole.delta.shape[1]))
        one.recent = mx.contiguous(mx.concatenate([whole.recent, before], axis=1)[:, i:])
        one.q, one.delta = whole.q[i : i + 1], whole.delta[i : i + 1]
        one.pooled = mx.stack([pooled, pooled])
        if one.new is not None:
            one.new = pooled[one.n_old : one.n_old + one.n_new]
        np.testing.assert_array_equal(host(one.run(launcher()))[0][0], out[i])


@LATER
@pytest.mark.parametrize(
    ("kernel", "change"),
    [
        ("attend_split", ("exists = int(at) >= before_window;", "")),
        ("attend_split", ("float2(0.0f);\n    if (exists)", "float2(0.0f);\n    if (slot < end)")),
        ("attend_split", ("at < W - 1 ?", "at < W ?")),
        ("attend_split", ("total[i] * decay +", "total[i] +")),
        ("attend_split", ("sums[h][t].thread_elements()[1] *= decays[head];", "")),
        ("attend_split", ("id < n_old ?", "id <= n_old ?")),
        ("attend_split", ("b < BLOCKS; b++) logit", "b < 1; b++) logit")),
        ("attend_split", ("16 * (tile_r / 2) + 2 * t", "16 * (tile_r / 4) + 2 * t")),
        ("attend_split", ("size_t(place[1]) *", "size_t(place[0] - 2) *")),
        ("attend_split", ("n_rows <= MORE_ROWS ? 64 : 128", "64")),
        ("attend_split", ("rows * most_parts < n_rows", "rows * most_parts * 2 < n_rows")),
        ("attend_merge", (" + exp(sink - highest)", "")),
        ("attend_merge", ("float2(table[0], -table[1])", "float2(table[0], table[1])")),
        ("attend_merge", ("sum += simd_shuffle(share, ushort(i)) *", "sum +=")),
    ],
)
def test_attention_planted(kernel: str, change: tuple[str, str]) -> None:
    cases = [Case(**CASES["all of few"]), Case(TINY, 5, 300, 24)]
    cases += [Case(TINY, 1, start, 24) for start in (2000, 17_000)]

    def check(launcher: Launcher) -> None:
        for case in cases:
            found, wanted = host(case.run(launcher))[0], host(case.expected())[0]
            np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5)

    caught(check, {kernel: change})


@LATER
def test_flash_reads_the_chosen_rows_and_no_others() -> None:
    """Each row once for every 16 heads; what the parts hand over is less than the rows read."""
    case = Case(FLASH, 1, 4000, 128, 4, 512, mx.bfloat16)
    found = traffic(case.run, "attend_split")
    row, groups = case.layout.row_bytes, 64 // 16
    useful = row - 1  # but for the padding
    assert found["pooled_rows"].touched + found["new_rows"].touched == 512 * useful
    assert found["window_rows"].touched + found["delta_rows"].touched == 128 * useful
    rows = sum(found[name].loaded for name in ("pooled_rows", "new_rows", "window_rows"))
    assert rows + found["delta_rows"].loaded <= 1.05 * groups * 640 * row
    assert found["partials"].stored <= groups * 640 * row
