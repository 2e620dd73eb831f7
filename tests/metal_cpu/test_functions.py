"""Metal's functions, executed in the natural order and in shuffled ones, against numpy."""

from typing import Any

import numpy as np
import pytest

pytest.importorskip("ziglang")
pytest.importorskip("ml_dtypes")

import ml_dtypes

from tools.metal_cpu import Kernel

pytestmark = pytest.mark.shader
SEEDS = (0, 1, 2)
RNG = np.random.default_rng(7)
LANE = np.arange(64) % 32


def run(source: str, x: np.ndarray, dtype: Any, seed: int = 0, header: str = "", **how: Any) -> Any:
    """One thread per element of x; `o[i]` is the result, `x[i]` the argument, `l` the lane."""
    head = "  uint i = thread_position_in_grid.x;\n  uint l = thread_index_in_simdgroup;\n"
    kernel = Kernel("f", ["x"], ["o"], head + source, header)
    how = {"threadgroup": (64, 1, 1), **how}
    return kernel(
        inputs=[x],
        output_shapes=[x.shape],
        output_dtypes=[dtype],
        grid=(x.size, 1, 1),
        seed=seed,
        **how,
    )[0]


def by_simdgroup(x: np.ndarray, f: Any) -> np.ndarray:
    return np.concatenate([np.broadcast_to(f(part), 32) for part in x.reshape(-1, 32)])


INTS = RNG.integers(-50, 50, 128).astype(np.int32)
EXCHANGES = {
    "simd_sum(x[i])": lambda x: by_simdgroup(x, np.sum),
    "simd_max(x[i])": lambda x: by_simdgroup(x, np.max),
    "simd_min(x[i])": lambda x: by_simdgroup(x, np.min),
    "simd_xor(x[i])": lambda x: by_simdgroup(x, np.bitwise_xor.reduce),
    "simd_and(x[i])": lambda x: by_simdgroup(x, np.bitwise_and.reduce),
    "simd_or(x[i])": lambda x: by_simdgroup(x, np.bitwise_or.reduce),
    "simd_product(x[i] % 2 + 2)": None,
    "simd_broadcast(x[i], 5)": lambda x: by_simdgroup(x, lambda p: p[5]),
    "simd_broadcast_first(x[i])": lambda x: by_simdgroup(x, lambda p: p[0]),
    "simd_shuffle(x[i], (l * 7 + 3) % 32)": lambda x: by_simdgroup(
        x, lambda p: p[(np.arange(32) * 7 + 3) % 32]
    ),
    "simd_shuffle_xor(x[i], 9)": lambda x: by_simdgroup(x, lambda p: p[np.arange(32) ^ 9]),
    "simd_shuffle_down(x[i], 3)": lambda x: by_simdgroup(x, lambda p: np.r_[p[3:], p[29:]]),
    "simd_shuffle_up(x[i], 3)": lambda x: by_simdgroup(x, lambda p: np.r_[p[:3], p[:29]]),
    "simd_shuffle_rotate_down(x[i], 3)": lambda x: by_simdgroup(x, lambda p: np.roll(p, -3)),
    "simd_shuffle_rotate_up(x[i], 3)": lambda x: by_simdgroup(x, lambda p: np.roll(p, 3)),
    "simd_shuffle_and_fill_up(x[i], 100 + (int)l, 3)": lambda x: by_simdgroup(
        x, lambda p: np.r_[[129, 130, 131], p[:29]]
    ),
    "simd_shuffle_and_fill_down(x[i], 100 + (int)l, 3)": lambda x: by_simdgroup(
        x, lambda p: np.r_[p[3:], [100, 101, 102]]
    ),
    "simd_prefix_inclusive_sum(x[i])": lambda x: by_simdgroup(x, np.cumsum),
    "simd_prefix_exclusive_sum(x[i])": lambda x: by_simdgroup(x, lambda p: np.cumsum(p) - p),
    "(int)popcount((ulong)simd_ballot(x[i] > 0))": lambda x: by_simdgroup(x, lambda p: sum(p > 0)),
    "simd_all(x[i] > -60) + 2 * simd_any(x[i] > 45)": lambda x: by_simdgroup(
        x, lambda p: 1 + 2 * np.any(p > 45)
    ),
    "quad_sum(x[i])": lambda x: x.reshape(-1, 4).sum(1).repeat(4),
    "quad_max(x[i])": lambda x: x.reshape(-1, 4).max(1).repeat(4),
    "quad_broadcast(x[i], 2)": lambda x: x.reshape(-1, 4)[:, 2].repeat(4),
    "quad_shuffle_xor(x[i], 1)": lambda x: x.reshape(-1, 2)[:, ::-1].ravel(),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("call", [c for c, f in EXCHANGES.items() if f])
def test_lanes_exchange_values(call: str, seed: int) -> None:
    got = run(f"  o[i] = {call};", INTS, "int32", seed)
    np.testing.assert_array_equal(got, EXCHANGES[call](INTS))


def test_half_and_bfloat_convert_into_each_other() -> None:
    body = """
      half h = half(x[i]); bfloat b = bfloat(x[i]);
      o[i] = bfloat(h) + 2 * float(half(b)) + 4 * float(bfloat4(half4(h)).y) + float(T(b) + T(h));
    """
    x = np.array([1.0, 1.0009765625, -3.140625, 7e4], np.float32)
    got = run(body, x, "float32", header="typedef bfloat T;\n")
    with np.errstate(over="ignore"):
        h, b = x.astype(np.float16), x.astype(ml_dtypes.bfloat16)
    hb, bh = (y.astype(np.float32) for y in (h.astype(b.dtype), b.astype(h.dtype)))
    total = (b + h.astype(b.dtype)).astype(np.float32)
    np.testing.assert_array_equal(got, hb + 2 * bh + 4 * hb + total)


def test_a_partial_simdgroup_reduces_what_it_has() -> None:
    x = np.arange(1, 41, dtype=np.float32)
    got = run("  o[i] = simd_sum(x[i]);", x, "float32", 3)
    np.testing.assert_array_equal(got, np.r_[np.full(32, x[:32].sum()), np.full(8, x[32:].sum())])


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_reductions_take_every_type(name: str) -> None:
    dtype = ml_dtypes.bfloat16 if name == "bfloat16" else np.dtype(name)
    x = (np.arange(32) % 3).astype(np.float32).astype(dtype)
    got = run("  o[i] = simd_sum(x[i]) + simd_max(x[i]);", x, name)
    np.testing.assert_array_equal(got.astype(np.float32), np.full(32, 31.0 + 2.0))


FLOATS = np.r_[RNG.uniform(-3, 3, 61), [0.0, -0.0, 0.5]].astype(np.float32)
MATHS = {
    "exp(x[i])": np.exp,
    "exp2(x[i])": np.exp2,
    "log(abs(x[i]) + 1)": lambda x: np.log(np.abs(x) + 1),
    "log2(abs(x[i]) + 1)": lambda x: np.log2(np.abs(x) + 1),
    "sqrt(abs(x[i]))": lambda x: np.sqrt(np.abs(x)),
    "rsqrt(abs(x[i]) + 1)": lambda x: 1 / np.sqrt(np.abs(x) + 1),
    "tanh(x[i])": np.tanh,
    "precise::sin(x[i])": np.sin,
    "fast::cos(x[i])": np.cos,
    "fma(x[i], 2.0, 1.0)": lambda x: x * 2 + 1,
    "floor(x[i])": np.floor,
    "rint(x[i])": np.rint,
    "round(x[i])": lambda x: np.copysign(np.floor(np.abs(x) + 0.5), x),
    "clamp(x[i], -1.0, 1.0)": lambda x: np.clip(x, -1, 1),
    "select(x[i], 9.0f, x[i] > 0)": lambda x: np.where(x > 0, 9, x),
    "sign(x[i])": np.sign,
    "pow(abs(x[i]), 1.5)": lambda x: np.abs(x) ** 1.5,
    "dot(float4(x[i], 1, 2, x[i]), float4(1, x[i], 0.5, 2))": lambda x: 4 * x + 1,
    "float(half(x[i]))": lambda x: x.astype(np.float16),
    "float(bfloat(x[i]))": lambda x: x.astype(ml_dtypes.bfloat16),
    "as_type<float>(as_type<uint>(x[i]) ^ 0x80000000u)": lambda x: -x,
    "x[i] * 0.5 + 1e-1": lambda x: x * np.float32(0.5) + np.float32(0.1),
}


@pytest.mark.parametrize("call", MATHS)
def test_functions_equal_numpy(call: str) -> None:
    got = run(f"  o[i] = {call};", FLOATS, "float32")
    np.testing.assert_allclose(got, MATHS[call](FLOATS).astype(np.float32), rtol=4e-7, atol=1e-7)


VECTORS = {
    "float4 v(x[i], 1, 2, 3); v.zw = v.xy * 2; v[1] += v.w; return v.x + v.y * 10 + v.z * 100;": (
        lambda x: x + 30 + 200 * x
    ),
    "half4 h = half4(float4(x[i])); h *= 2; h.xy = h.yx; return float(h.y + h.wzyx[1]);": (
        lambda x: (x.astype(np.float16) * np.float16(4)).astype(np.float32)
    ),
    "uchar4 u = as_type<uchar4>(as_type<uint>(x[i])); return float(u.w) + float(u.x >> 4);": (
        lambda x: (x.view(np.uint32) >> 24) + ((x.view(np.uint32) & 255) >> 4)
    ),
    "float3 a = float3(x[i], 0, 1).zyx; bool3 b = a > 0.5; return b.x + 2 * any(b) + 4 * all(b);": (
        lambda x: 3 + 0 * x
    ),
    "uint4 q = uint4(as_type<uint>(x[i])) >> uint4(0, 8, 16, 24) & 255; return q.y + 256 * q.z;": (
        lambda x: (x.view(np.uint32) >> 8) & 0xFFFF
    ),
    "uint u = as_type<uint>(x[i]); ushort n = popcount(u); return n + 100 * int(clz(u | 1));": (
        lambda x: [
            int(u).bit_count() + 100 * (32 - int(u | 1).bit_length()) for u in x.view(np.uint32)
        ]
    ),
}


@pytest.mark.parametrize("body", VECTORS)
def test_vectors(body: str) -> None:
    got = run("  o[i] = f(x[i], x, i);", FLOATS, "float32", header=f"""
      inline float f(float, device const float* x, uint i) {{ {body} }}
    """)
    np.testing.assert_allclose(got, np.asarray(VECTORS[body](FLOATS), np.float32), rtol=1e-6)


def test_pointer_casts_tables_templates_and_overloads() -> None:
    header = """
    constant float table[4] = {1.0, 2.0, 4.0, 8.0};
    constant constexpr uint3 corner[2] = {{1, 2, 3}, {4, 5, 6}};
    constexpr constant int K = 3;
    template <typename T, int N, bool B> T pick(device const T* p) { return B ? p[N] : T(0); }
    METAL_FUNC float where(device const float*) { return 1; }
    METAL_FUNC float where(threadgroup const float*) { return 2; }
    METAL_FUNC float where(thread const float*) { return 3; }
    METAL_FUNC float where(constant const float*) { return 4; }
    struct Block { half d; uchar q[2]; };
    """
    source = """
      threadgroup float shared_[2][32];
      float own[2] = {1, 2};
      shared_[l & 1][l] = x[i];
      threadgroup_barrier(mem_flags::mem_threadgroup);
      float4 v = *(device const float4*)(x + 4 * (l / 4));
      device const Block* blocks = (device const Block*)x;
      const int local = K;
      o[i] = table[l & 3] + v.w + pick<float, 2, true>(x) + float(corner[1].y) + local
           + 10 * where(x) + 100 * where(&shared_[0][0]) + 1000 * where(own) + 10000 * where(table)
           + float(blocks[1].q[1]);
    """
    x = np.arange(32, dtype=np.float32)
    want = np.array([1, 2, 4, 8], np.float32)[LANE[:32] & 3] + 4 * (LANE[:32] // 4) + 3 + 2 + 5 + 3
    want = want + 43210 + x.view(np.uint8)[7]
    np.testing.assert_array_equal(run(source, x, "float32", header=header), want)


@pytest.mark.parametrize("name", ["float", "half", "bfloat"])
@pytest.mark.parametrize("seed", SEEDS)
def test_simdgroup_matrices_multiply(name: str, seed: int) -> None:
    dtype = {"float": "float32", "half": "float16", "bfloat": "bfloat16"}[name]
    kernel = Kernel(
        "mma",
        ["a", "b"],
        ["o", "t"],
        """
        threadgroup T stage[64];
        simdgroup_matrix<T, 8, 8> x, y;
        simdgroup_matrix<float, 8, 8> acc(0.0f);
        for (int k = 0; k < 16; k += 8) {
          simdgroup_load(x, a + k, 16);
          simdgroup_load(y, b + k * 8, 8);
          simdgroup_multiply_accumulate(acc, x, y, acc);
        }
        simdgroup_store(acc, o, 8);
        stage[thread_index_in_simdgroup * 2] = b[thread_index_in_simdgroup * 2];
        stage[thread_index_in_simdgroup * 2 + 1] = b[thread_index_in_simdgroup * 2 + 1];
        threadgroup_barrier(mem_flags::mem_threadgroup);
        simdgroup_load(y, stage, 8, ulong2(0, 0), true);
        simdgroup_store(y, t, 8);
        """,
    )
    kind = ml_dtypes.bfloat16 if name == "bfloat" else np.dtype(dtype)
    a = RNG.normal(size=(8, 16)).astype(kind)
    b = RNG.normal(size=(16, 8)).astype(kind)
    got, turned = kernel(
        inputs=[a, b],
        template=[("T", dtype)],
        output_shapes=[(8, 8), (8, 8)],
        output_dtypes=["float32", dtype],
        grid=(32, 1, 1),
        threadgroup=(32, 1, 1),
        seed=seed,
    )
    want = a.astype(np.float64) @ b.astype(np.float64)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(turned, b[:8].T)


def test_atomics_count_over_all_threadgroups() -> None:
    kernel = Kernel(
        "count",
        ["x"],
        ["n", "s"],
        """
        threadgroup atomic_int inside;
        uint t = thread_position_in_threadgroup.x;
        if (t == 0) atomic_store_explicit(&inside, 0, memory_order_relaxed);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        atomic_fetch_add_explicit(&inside, 1, memory_order_relaxed);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        if (t == 0) {
          float all = atomic_load_explicit(&inside, memory_order_relaxed);
          atomic_fetch_add_explicit(&n[0], all, memory_order_relaxed);
        }
        atomic_fetch_max_explicit(&s[0], x[thread_position_in_grid.x], memory_order_relaxed);
        """,
        atomic_outputs=True,
    )
    x = RNG.normal(size=10_000).astype(np.float32)
    n, s = kernel(
        inputs=[x],
        output_shapes=[(1,), (1,)],
        output_dtypes=["float32", "float32"],
        grid=(10_000, 1, 1),
        threadgroup=(96, 1, 1),
        init_value=-1,
        workers=2,
        seed=5,
    )
    assert n[0] == 9_999 and s[0] == x.max()
