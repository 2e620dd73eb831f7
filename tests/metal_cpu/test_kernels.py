"""Kernels of the kinds an engine is made of: right against numpy, and clean in check mode."""

from typing import Any

import numpy as np
import pytest

pytest.importorskip("ziglang")
pytest.importorskip("ml_dtypes")

import ml_dtypes

from tools.metal_cpu import Kernel

pytestmark = pytest.mark.shader
HOW = [("fast", 0), ("fast", 1), ("fast", 2), ("check", 0), ("check", 3)]
RNG = np.random.default_rng(11)

MATVEC = Kernel(
    name="q4_matvec",
    input_names=["w", "x", "table"],
    output_names=["y"],
    header="""
struct Block { half scale; uchar q[16]; };

template <typename T>
METAL_FUNC float block_dot(device const Block* block, device const T* x,
                           threadgroup const float* table) {
  float sum = 0;
  for (short k = 0; k < 16; k++) {
    const uchar q = block->q[k];
    sum = fma(table[q & 15], float(x[k]), sum);
    sum = fma(table[q >> 4], float(x[k + 16]), sum);
  }
  return sum * float(block->scale);
}
""",
    source="""
  threadgroup float codes[16];
  const uint t = thread_index_in_threadgroup, lane = thread_index_in_simdgroup;
  if (t < 16) codes[t] = table[t];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const uint row = threadgroup_position_in_grid.y * simdgroups_per_threadgroup
                 + simdgroup_index_in_threadgroup;
  float sum = 0;
  if (row < ROWS) {
    device const Block* blocks = (device const Block*)w + (ulong)row * BLOCKS;
    for (uint b = lane; b < BLOCKS; b += 32) sum += block_dot(blocks + b, x + 32 * b, codes);
  }
  sum = simd_sum(sum);
  if (lane == 0 && row < ROWS) y[row] = T(sum);
""",
)


@pytest.mark.parametrize(("mode", "seed"), HOW)
@pytest.mark.parametrize(("rows", "blocks"), [(7, 3), (16, 40)])
def test_a_quantised_product(rows: int, blocks: int, mode: str, seed: int) -> None:
    scale = RNG.uniform(0.5, 2, (rows, blocks)).astype(np.float16)
    q = RNG.integers(0, 256, (rows, blocks, 16), np.uint8)
    w = np.concatenate([scale[..., None].view(np.uint8), q], axis=-1)
    x = RNG.normal(size=blocks * 32).astype(np.float32)
    table = RNG.normal(size=16).astype(np.float32)
    [y] = MATVEC(
        inputs=[w, x, table],
        template=[("T", "float32"), ("ROWS", rows), ("BLOCKS", blocks)],
        grid=(32, 4 * -(-rows // 4), 1),
        threadgroup=(32, 4, 1),
        output_shapes=[(rows,)],
        output_dtypes=["float32"],
        mode=mode,
        seed=seed,
    )
    codes = np.concatenate([table[q & 15], table[q >> 4]], axis=-1) * scale[..., None]
    want = codes.reshape(rows, -1).astype(np.float64) @ x
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4)
    if mode == "check":
        traffic = MATVEC.last.traffic
        assert traffic["w"].touched == traffic["w"].loaded == w.nbytes
        assert traffic["y"].stored == traffic["y"].touched == y.nbytes


GEMM = Kernel(
    name="gemm",
    input_names=["a", "b"],
    output_names=["c"],
    source="""
  // C[M, N] = A[M, K] B[N, K]^T in tiles of 32 x 32; four simdgroups, each 16 x 16 of the tile.
  threadgroup T tile_a[32 * 16];
  threadgroup T tile_b[32 * 16];
  threadgroup float tile_c[32 * 32];
  const uint t = thread_index_in_threadgroup, g = simdgroup_index_in_threadgroup;
  const uint m0 = threadgroup_position_in_grid.y * 32, n0 = threadgroup_position_in_grid.x * 32;
  const uint r0 = (g / 2) * 16, c0 = (g % 2) * 16;
  simdgroup_matrix<float, 8, 8> acc[2][2];
  for (short i = 0; i < 2; i++)
    for (short j = 0; j < 2; j++) acc[i][j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0);
  for (uint k0 = 0; k0 < K; k0 += 16) {
    for (uint e = t; e < 32 * 16; e += 128) {
      const uint r = e / 16, k = k0 + e % 16;
      tile_a[e] = m0 + r < M && k < K ? a[(m0 + r) * K + k] : T(0);
      tile_b[e] = n0 + r < N && k < K ? b[(n0 + r) * K + k] : T(0);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint k = 0; k < 16; k += 8) {
      simdgroup_matrix<T, 8, 8> x[2], y[2];
      for (short i = 0; i < 2; i++) {
        simdgroup_load(x[i], tile_a + (r0 + 8 * i) * 16 + k, 16);
        simdgroup_load(y[i], tile_b + (c0 + 8 * i) * 16 + k, 16, ulong2(0, 0), true);
      }
      for (short i = 0; i < 2; i++)
        for (short j = 0; j < 2; j++)
          simdgroup_multiply_accumulate(acc[i][j], x[i], y[j], acc[i][j]);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  for (short i = 0; i < 2; i++)
    for (short j = 0; j < 2; j++)
      simdgroup_store(acc[i][j], tile_c + (r0 + 8 * i) * 32 + c0 + 8 * j, 32);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint e = t; e < 32 * 32; e += 128) {
    const uint m = m0 + e / 32, n = n0 + e % 32;
    if (m < M && n < N) c[m * N + n] = tile_c[e];
  }
""",
)


@pytest.mark.parametrize(("mode", "seed"), HOW)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_tiled_matrix_product(dtype: str, mode: str, seed: int) -> None:
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    m, n, k = 45, 70, 40
    a, b = (RNG.normal(size=s).astype(kind) for s in ((m, k), (n, k)))
    [c] = GEMM(
        inputs=[a, b],
        template=[("T", dtype), ("M", m), ("N", n), ("K", k)],
        grid=(128 * -(-n // 32), -(-m // 32), 1),
        threadgroup=(128, 1, 1),
        output_shapes=[(m, n)],
        output_dtypes=["float32"],
        mode=mode,
        seed=seed,
    )
    want = a.astype(np.float64) @ b.astype(np.float64).T
    np.testing.assert_allclose(c, want, rtol=1e-5, atol=1e-5)


ATTEND = Kernel(
    name="attend",
    input_names=["q", "keys", "values", "n_keys"],
    output_names=["out"],
    source="""
  // One threadgroup per row: its simdgroups share the keys, each with a running maximum; then all
  // of them are put together.
  constexpr int PER = D / 32;
  threadgroup float maxima[GROUPS], sums[GROUPS], partial[GROUPS][D];
  const uint row = threadgroup_position_in_grid.x;
  const uint g = simdgroup_index_in_threadgroup, lane = thread_index_in_simdgroup;
  float mine[PER], acc[PER];
  for (short k = 0; k < PER; k++) mine[k] = float(q[row * D + lane * PER + k]) * rsqrt(float(D));
  for (short k = 0; k < PER; k++) acc[k] = 0;
  float top = -INFINITY, sum = 0;
  for (int j = g; j < n_keys; j += GROUPS) {
    float score = 0;
    for (short k = 0; k < PER; k++) score += mine[k] * float(keys[j * D + lane * PER + k]);
    score = simd_sum(score);
    const float before = top;
    top = max(top, score);
    const float keep = exp(before - top), weight = exp(score - top);
    sum = sum * keep + weight;
    for (short k = 0; k < PER; k++)
      acc[k] = acc[k] * keep + weight * float(values[j * D + lane * PER + k]);
  }
  for (short k = 0; k < PER; k++) partial[g][lane * PER + k] = acc[k];
  if (lane == 0) { maxima[g] = top; sums[g] = sum; }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float all = -INFINITY, total = 0;
  for (int h = 0; h < GROUPS; h++) all = max(all, maxima[h]);
  for (int h = 0; h < GROUPS; h++) total += sums[h] * exp(maxima[h] - all);
  for (uint d = thread_index_in_threadgroup; d < D; d += 32 * GROUPS) {
    float x = 0;
    for (int h = 0; h < GROUPS; h++) x += partial[h][d] * exp(maxima[h] - all);
    out[row * D + d] = T(x / total);
  }
""",
)


def attend(q: np.ndarray, keys: np.ndarray, values: np.ndarray, n: int, **how: Any) -> np.ndarray:
    rows, d = q.shape
    [out] = ATTEND(
        inputs=[q, keys, values, n],
        template=[("T", "float32"), ("D", d), ("GROUPS", 4)],
        grid=(128 * rows, 1, 1),
        threadgroup=(128, 1, 1),
        output_shapes=[q.shape],
        output_dtypes=["float32"],
        **how,
    )
    return out


@pytest.mark.parametrize(("mode", "seed"), HOW)
@pytest.mark.parametrize("n", [4, 37])
def test_attention_with_a_running_maximum(n: int, mode: str, seed: int) -> None:
    q, keys, values = (RNG.normal(size=(r, 64)).astype(np.float32) for r in (5, 40, 40))
    out = attend(q, keys, values, n, mode=mode, seed=seed)
    scores = q @ keys[:n].T / 8
    weights = np.exp(scores - scores.max(1, keepdims=True))
    want = weights @ values[:n] / weights.sum(1, keepdims=True)
    np.testing.assert_allclose(out, want, rtol=2e-5, atol=2e-6)
    if mode == "check":
        traffic = ATTEND.last.traffic
        assert traffic["keys"].touched == keys[:n].nbytes
        assert traffic["keys"].efficiency == 1.0
        assert traffic["keys"].loaded == 5 * keys[:n].nbytes


def test_a_sample_of_threadgroups() -> None:
    """Of six threadgroups, a row of the result each, the first and the fourth."""
    q, keys, values = (RNG.normal(size=(r, 64)).astype(np.float32) for r in (6, 8, 8))
    whole = attend(q, keys, values, 8)
    out = attend(q, keys, values, 8, mode="check", sampled=2)
    np.testing.assert_array_equal(out[[0, 3]], whole[[0, 3]])
    traffic = ATTEND.last.traffic
    assert traffic["out"].stored == q[:2].nbytes and traffic["keys"].loaded == 2 * keys.nbytes


def test_a_missing_barrier_in_attention_is_found() -> None:
    barrier = "  threadgroup_barrier(mem_flags::mem_threadgroup);\n"
    broken = Kernel("attend", ATTEND.input_names, ["out"], ATTEND.source.replace(barrier, ""))
    q = RNG.normal(size=(2, 64)).astype(np.float32)
    with pytest.raises(Exception, match=r"attend: race: on byte \d+ of threadgroup array 'maxima'"):
        broken(
            inputs=[q, q, q, 2],
            template=[("T", "float32"), ("D", 64), ("GROUPS", 4)],
            grid=(256, 1, 1),
            threadgroup=(128, 1, 1),
            output_shapes=[q.shape],
            output_dtypes=["float32"],
            mode="check",
        )
