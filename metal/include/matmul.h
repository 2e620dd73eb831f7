// Products of many activation rows with packed weights, in tiles of BM rows of activations and BN
// of weights.
//
// Weights are decoded once per tile and 32 inputs into threadgroup memory as float32, where
// simdgroup matrices take them; so a prompt is computed from the very numbers that decoding uses,
// and its results differ from decoding's by the order of float32 sums alone. What float32 costs is
// twice the traffic of threadgroup memory; a simdgroup's block of BM/2 x 32 results keeps it to
// three loads of a matrix for every four or more products. Lanes read packed weights word by word
// and share lines with their neighbours and the next 32 inputs: a tile of weights is small enough
// for the first cache, and its bytes are used BM times.
//
// A row's result depends on the inputs' number alone, not on the rows that are computed with it.

#include "formats.h"

enum { BN = 64, BK = 32, TILE_STRIDE = BK + 4, OUT_STRIDE = BN + 4, MATMUL_SIMDGROUPS = 4 };

// Float4s of threadgroup memory for a tile: both operands, then the results in their place.
constexpr int tile_words(int bm) { return (bm + BN) * TILE_STRIDE / 4; }

// The weight rows of a tile: HALF of them from byte start[0] of words[0] on and, where HALF < BN,
// as many from start[1] of words[1]. The arrays' lengths are multiples of four bytes.
template <int HALF> struct tile_rows {
  device const uint* words[2];
  ulong start[2];
};

// out[r * OUT_STRIDE + c] = dot(x's row r, weight row c) for r < n_x <= BM, c % HALF < n_rows, in
// `tiles`, for the whole threadgroup. x.four(r, k) gives activations k..k+3 of row r.
template <int F, int K, int BM, int HALF, typename T, typename X>
inline void tile_matmul(tile_rows<HALF> weights, int n_rows, X x, int n_x,
                        threadgroup float4* tiles, threadgroup const uint2* points, uint sg,
                        uint lane) {
  constexpr int THREADS = 32 * MATMUL_SIMDGROUPS, ROWS = BM / 16;  // 8x8 blocks of a simdgroup
  threadgroup float4* xs = tiles;
  threadgroup float4* ws = tiles + BM * TILE_STRIDE / 4;
  simdgroup_float8x8 sums[ROWS][4];
  MLX_MTL_PRAGMA_UNROLL
  for (int i = 0; i < ROWS * 4; i++) {
    sums[i / 4][i % 4] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  }
  int thread_index = int(32 * sg + lane);
  threadgroup const float* x_block = (threadgroup const float*)xs + sg / 2 * (BM / 2) * TILE_STRIDE;
  threadgroup const float* w_block = (threadgroup const float*)ws + sg % 2 * 32 * TILE_STRIDE;
  for (int k0 = 0; k0 < K; k0 += BK) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int i = thread_index; i < BM * BK / 4; i += THREADS) {
      int row = i / (BK / 4), k = k0 + 4 * (i % (BK / 4));
      float4 v = float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (row < n_x && k < K) v = x.four(row, k);
      xs[row * TILE_STRIDE / 4 + i % (BK / 4)] =
          float4(float(T(v.x)), float(T(v.y)), float(T(v.z)), float(T(v.w)));
    }
    for (int i = thread_index; i < BN * BK / 8; i += THREADS) {
      int row = i / (BK / 8), k = k0 + 8 * (i % (BK / 8));
      float4 lo = float4(0.0f, 0.0f, 0.0f, 0.0f), hi = lo;
      if (row % HALF < n_rows && k < K) {
        int part = row / HALF;
        ulong begin = weights.start[part] + ulong(row % HALF) * row_bytes(F, K);
        uint at = uint(begin & 3);
        octet w = octet_at<F>(weights.words[part] + (begin >> 2),
                              at + row_bytes(F, k / 256 * 256), uint(k % 256) / 8, points);
        lo = w.lo * w.scale - w.least;
        hi = w.hi * w.scale - w.least;
      }
      ws[row * TILE_STRIDE / 4 + 2 * (i % (BK / 8))] = lo;
      ws[row * TILE_STRIDE / 4 + 2 * (i % (BK / 8)) + 1] = hi;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    MLX_MTL_PRAGMA_UNROLL
    for (int k = 0; k < BK; k += 8) {
      simdgroup_float8x8 a, b[4];
      MLX_MTL_PRAGMA_UNROLL
      for (int j = 0; j < 4; j++) {
        simdgroup_load(b[j], w_block + 8 * j * TILE_STRIDE + k, TILE_STRIDE, ulong2(0, 0), true);
      }
      MLX_MTL_PRAGMA_UNROLL
      for (int i = 0; i < ROWS; i++) {
        simdgroup_load(a, x_block + 8 * i * TILE_STRIDE + k, TILE_STRIDE);
        MLX_MTL_PRAGMA_UNROLL
        for (int j = 0; j < 4; j++) simdgroup_multiply_accumulate(sums[i][j], a, b[j], sums[i][j]);
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  threadgroup float* out = (threadgroup float*)tiles + sg / 2 * (BM / 2) * OUT_STRIDE + sg % 2 * 32;
  MLX_MTL_PRAGMA_UNROLL
  for (int i = 0; i < ROWS * 4; i++) {
    simdgroup_store(sums[i / 4][i % 4], out + i / 4 * 8 * OUT_STRIDE + i % 4 * 8, OUT_STRIDE);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}
