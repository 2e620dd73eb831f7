"""The indexer's search: shaders against the plain operations, and exact where scores are exact."""

from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest

from ds4py.cache import rows as stored
from ds4py.kernels import index
from ds4py.kernels.build import Launcher
from ds4py.kernels.ops import MlxOps, Ops
from tests.kernels.near import traffic
from tests.kernels.shaders import DTYPES, LATER, caught, host, launcher, shader_runs
from tests.kernels.test_heads import FLASH, ODD, TINY, Size, layer, normal

pytestmark = pytest.mark.shader
OPS = cast(Ops, MlxOps())
LAYOUT = stored.RowLayout(128, 4, 32, 0)


class Case:
    """n queries from a position on, over n_old + n_new index rows; what none may see is NaN."""

    def __init__(
        self,
        size: Size,
        n: int,
        start: int,
        k: int,
        dtype: Any = mx.float32,
        native: bool = True,
        ratio: int = 4,
    ):
        self.shape, self.k, self.start = layer(size, "indexed", native), k, start
        heads = size.index_heads
        self.packed_query = self.store(normal(1, n, heads, 128).astype(dtype))
        self.weights = normal(2, n, heads)
        self.n_old, end = start // ratio, (start + n) // ratio
        self.visible = mx.array(((np.arange(start, start + n) + 1) // ratio).astype(np.int32))
        committed = normal(3, 2, self.n_old + 3, 128)
        committed[:, self.n_old :] = np.nan
        committed[0] = np.nan
        self.committed = self.store(committed.astype(dtype))
        fresh = normal(4, end - self.n_old, 128).astype(dtype)
        self.new = self.store(fresh) if end > self.n_old else None
        self.n_rows = end

    @property
    def query(self) -> Any:
        return self.load(self.packed_query)

    def store(self, rows: Any) -> Any:
        return stored.pack(OPS, LAYOUT, rows) if self.shape.native else rows

    def load(self, rows: Any) -> Any:
        return stored.unpack(OPS, LAYOUT, rows) if self.shape.native else rows

    @property
    def rows(self) -> Any:
        parts = [self.committed[1, : self.n_old]] if self.n_old else []
        parts += [] if self.new is None else [self.new]
        return self.load(mx.concatenate(parts))

    def run(self, launcher: Launcher, n_parts: int | None = None) -> Any:
        place = mx.array(np.array([0, 1], np.int32))
        step = mx.array(np.array([self.start, self.n_old], np.int32))
        known = self.committed if self.n_old else None
        rows = (self.packed_query, self.weights, known, self.new)
        if n_parts is None:
            return [
                index.search(
                    *(launcher, self.shape, *rows, self.n_rows, self.visible, place, step, self.k)
                )
            ]
        keys, ids = index.candidates(
            launcher, self.shape, *rows, self.visible, place, step, self.k, n_parts
        )
        return [index.merge(launcher, keys, ids)]

    def compare(self, made: Any) -> None:
        """Every chosen row's score is at least the k-th's but for rounding, and nothing is chosen
        twice. With exact arithmetic this is equality, which `test_exact_scores` asks for."""
        (found,) = host(made)
        score = np.array(index.scores(OPS, self.query, self.weights, self.padded))[:, : self.n_rows]
        for ids, values, visible in zip(found, score, np.array(self.visible), strict=True):
            n = min(self.k, int(visible))
            assert (ids[n:] == 0).all()
            chosen = ids[:n]
            assert (np.diff(chosen) > 0).all() and (n == 0 or chosen[0] >= 0)
            assert n == 0 or chosen[-1] < visible
            best = np.sort(values[:visible])[::-1][:n]
            if n:
                slack = 1e-5 * np.abs(values[:visible]).max()
                assert values[chosen].min() >= best[-1] - slack

    @property
    def padded(self) -> Any:
        return OPS.append_zeros(self.rows, -self.n_rows % index.TILE)


CASES: dict[str, tuple[Any, ...]] = {
    "tiny": (TINY, 1, 400, 32),
    "one more row than chosen": (TINY, 5, 131, 32),
    "new rows only": (TINY, 40, 0, 8),
    "some queries see few": (TINY, 33, 20, 8),
    "golden": (ODD, 3, 200, 16),
    "many rows": (TINY, 2, 9000, 32),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_search(name: str, dtype: Any) -> None:
    case = Case(*CASES[name], dtype=dtype)
    for made in shader_runs(case.run):
        case.compare(made)


@LATER
def test_search_over_float_rows() -> None:
    case = Case(*CASES["golden"], native=False)
    for made in shader_runs(case.run):
        case.compare(made)


@LATER
def test_search_of_flash() -> None:
    case = Case(FLASH, 1, 4 * 2300, 512, mx.bfloat16)
    for made in shader_runs(case.run):
        case.compare(made)


def unscaled(codes: Any) -> Any:
    """Packed rows [..., 64] of FP4 pairs with scales of 1."""
    scales = np.full((*codes.shape[:-1], 4), 127, np.uint8)
    return mx.array(np.concatenate([codes, scales], axis=-1))


def exact(case: Case, kind: str) -> Case:
    """Small integers everywhere, so that scores are exact in any order and ties are many."""
    rng = np.random.default_rng(8)
    n, heads, d = case.query.shape
    codes = rng.choice([0x00, 0x02, 0x20, 0x22], (n, heads, d // 2)).astype(np.uint8)  # 0 and 1
    case.packed_query = unscaled(codes)
    case.weights = mx.array(rng.integers(-2, 3, (n, heads)).astype(np.float32))
    codes = rng.integers(0, 4, (2, case.n_old + 3, 64)).astype(np.uint8)
    if kind == "rising":  # the worst order: every row is better than all before it
        case.weights = mx.ones((n, heads))
        steps = np.arange(case.n_old + 3)[None, :, None] * 64 // (case.n_old + 3)
        codes = np.where(np.arange(64) < steps, 4, 0).astype(np.uint8)
        codes = np.broadcast_to(codes, (2, case.n_old + 3, 64))
    case.committed = unscaled(codes)
    if kind == "equal":
        case.weights = case.weights * -0.0
    return case


@pytest.mark.parametrize("kind", ["ties", "equal", "rising"])
@pytest.mark.parametrize("n_parts", [1, 3])
def test_exact_scores(kind: str, n_parts: int) -> None:
    """Equality with the reference, ties to the lower row, however the rows are split."""
    case = exact(Case(TINY, 2, 4 * 3000, 32), kind)
    wanted = index.search_ref(OPS, case.query, case.weights, case.rows, case.visible, case.k)
    for made in shader_runs(lambda launcher: case.run(launcher, n_parts)):
        assert host(made)[0].tolist() == np.array(wanted).tolist()


@LATER
def test_the_longest_list_fits() -> None:
    """Pro chooses 1,024 rows: what must lie in threadgroup memory stays under 32 KB."""
    case = exact(Case(FLASH, 1, 4 * 1400, 1024), "ties")
    wanted = index.search_ref(OPS, case.query, case.weights, case.rows, case.visible, case.k)
    assert host(case.run(launcher()))[0].tolist() == np.array(wanted).tolist()


@LATER
@pytest.mark.parametrize(
    ("kernel", "change"),
    [
        ("index_candidates", ("max(dots[i].thread_elements()[1], 0.0f)", "0.0f")),
        ("index_candidates", ("e2m1_decode(codes >> 4)", "e2m1_decode(codes)")),
        ("index_candidates", ("(part * (D / 4) + 8 * w) / FP4_BLOCK", "0")),
        ("index_candidates", ("id < n_old\n", "id < n_old + 1\n")),
        ("index_candidates", ("id < n_rows ? score_key", "id <= n_rows ? score_key")),
        ("index_candidates", ("sums[i] += simd_shuffle_xor(sums[i], ushort(8));", "")),
        ("index_candidates", ("? ~bits : bits", "? bits : bits")),
        ("index_candidates", ("other_key && id < other_id", "other_key && id > other_id")),
        ("index_candidates", ("keys[K - 1], ids[K - 1]}", "keys[0], ids[0]}")),
        ("index_candidates", ("size < 2 * N; size *= 2", "size < N; size *= 2")),
        ("index_merge", ("i < list.count ? ~ids[i] : 0", "i < list.count ? ids[i] : 0")),
        ("index_merge", ("i < list.count ? int(ids[i]) : 0", "int(ids[i])")),
        ("index_merge", ("if (i < thread_id / 32) at += counts[i]", "at += 0")),
    ],
)  # fmt: skip
def test_search_planted(kernel: str, change: tuple[str, str]) -> None:
    tied, near = exact(Case(TINY, 2, 4 * 1500, 32), "ties"), Case(ODD, 33, 120, 32)
    rising = exact(Case(TINY, 1, 4 * 1024, 32), "rising")  # fills the list to the last slot

    def check(launcher: Launcher) -> None:
        near.compare(near.run(launcher))
        for case, n_parts in ((tied, 2), (rising, 1)):
            wanted = index.search_ref(
                OPS, case.query, case.weights, case.rows, case.visible, case.k
            )
            assert host(case.run(launcher, n_parts))[0].tolist() == np.array(wanted).tolist()

    caught(check, {kernel: change})


@LATER
def test_flash_reads_every_row_once() -> None:
    """But for the scales, one byte of which four lanes read in turn with four words of codes."""
    case = Case(FLASH, 1, 4 * 2300, 512, mx.bfloat16)
    found = traffic(case.run, "index_candidates")["index_rows"]
    assert found.touched == 2300 * LAYOUT.row_bytes
    assert found.loaded <= 1.2 * found.touched
