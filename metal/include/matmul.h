// Products of many activation rows with packed weights, in tiles of BM rows of activations and BN
// of weights.
//
// A tile's weights come from device memory piece by piece, some blocks of each row, in whole lines.
// They are decoded once per tile and 32 inputs into threadgroup memory as float32, where simdgroup
// matrices take them; so a prompt is computed from the very numbers that decoding uses, and its
// results differ from decoding's by the order of float32 sums alone. What float32 costs is twice
// the traffic of threadgroup memory; a simdgroup's block of BM/2 x 32 results keeps it to three
// loads of a matrix for every four or more products.
//
// A row's result depends on the inputs' number alone, not on the rows that are computed with it.

#include "formats.h"
#include "lines.h"

enum { BN = 64, BK = 32, TILE_STRIDE = BK + 4, OUT_STRIDE = BN + 4, MATMUL_SIMDGROUPS = 4 };
enum { MATMUL_THREADS = 32 * MATMUL_SIMDGROUPS };

// Float4s of threadgroup memory for a tile: both operands, then the results in their place.
constexpr int tile_words(int bm) { return (bm + BN) * TILE_STRIDE / 4; }

// Values of a piece: whole blocks, about a line.
constexpr int tile_piece(int format) {
  return format == FORMAT_F32 ? 32
      : block_values(format) == 1 ? 64
      : format == FORMAT_Q8_0 || format == FORMAT_FP8 ? 128
                                                      : 256;
}

// Bytes of threadgroup memory for a row's piece, and 16-byte words for all rows'.
constexpr int tile_room(int format) {
  return (row_bytes(format, tile_piece(format)) + 30) / 16 * 16;
}
constexpr int packed_words(bool has_q6_k) {
  return BN * tile_room(has_q6_k ? FORMAT_Q6_K : FORMAT_Q8_0) / 16;
}

// The pieces of a tile's rows: HALF of them from byte start[0] of words[0] on and, where HALF < BN,
// as many from start[1] of words[1]. Of every line of row index / 8 + 16 * j a thread has word
// index % 8. The end of a row's last line is the beginning of the next row's first: it is loaded
// by those who have the next row, and kept until the row before needs it.
template <int F, int K, int HALF> struct tile_weights {
  enum { ROW = row_bytes(F, K), PIECE = tile_piece(F), ROOM = tile_room(F), ROWS = 4 };
  uint4 carried[ROWS];  // of the last line that was loaded
  uint4 head[ROWS];     // of the row's first line

  // Puts values k0 to k0 + PIECE of the first n_rows rows into `packed`.
  void load(weight_rows<BN / HALF> weights, int n_rows, int k0, threadgroup uint4* packed,
            int index) {
    int last = smaller(k0 + PIECE, K);
    MLX_MTL_PRAGMA_UNROLL
    for (int j = 0; j < ROWS; j++) {
      int row = index / 8 + MATMUL_THREADS / 8 * j, part = row / HALF, r = row % HALF;
      if (r >= n_rows) continue;
      ulong start = weights.start[part] + ulong(r) * ROW;
      ulong begin = start + row_bytes(F, k0), end = start + row_bytes(F, last);
      ulong row_end = r + 1 < n_rows ? line_of(start + ROW) : start + ROW;
      ulong from = k0 == 0 ? line_of(begin) : line_of(begin + LINE - 1), word = 16 * (index % 8);
      threadgroup uint4* own = packed + row * (ROOM / 16);
      if (k0 > 0) {
        ulong at = from - LINE + word;
        if (at + 16 > begin && at < min(end, row_end)) own[(at >> 4) - (begin >> 4)] = carried[j];
      }
      for (ulong line = from; line < min(end, row_end) || (k0 == 0 && line == from); line += LINE) {
        ulong at = line + word;
        if (at + 16 <= begin - (k0 == 0 && r > 0 ? ROW : 0) || at >= start + ROW) continue;
        carried[j] = word_of_16(weights.words[part], weights.size[part], at);
        if (at + 16 > begin && at < min(end, row_end)) own[(at >> 4) - (begin >> 4)] = carried[j];
        if (k0 == 0 && line == from) head[j] = carried[j];
      }
      ulong at = line_of(start) + word;
      if (r > 0 && at + 16 > begin - ROW && at < end - ROW) {
        own[int((at >> 4) - ((begin - ROW) >> 4)) - ROOM / 16] = head[j];
      }
    }
  }

  // Where the piece with value k of a tile's row lies in `packed`, in bytes.
  static uint piece_at(weight_rows<BN / HALF> weights, int row, int k) {
    int first = k / PIECE * PIECE;
    ulong begin = weights.start[row / HALF] + ulong(row % HALF) * ROW + row_bytes(F, first);
    return uint(begin & 15) + row * ROOM;
  }
};

// out[r * OUT_STRIDE + c] = dot(x's row r, weight row c) for r < n_x <= BM, c % HALF < n_rows, in
// `tiles`, for the whole threadgroup. x.four(r, k) gives activations k..k+3 of row r.
template <int F, int K, int BM, int HALF, typename T, typename X>
inline void tile_matmul(weight_rows<BN / HALF> weights, int n_rows, X x, int n_x,
                        threadgroup float4* tiles, threadgroup uint4* packed,
                        threadgroup const uint2* points, uint sg, uint lane) {
  constexpr int THREADS = MATMUL_THREADS, ROWS = BM / 16;  // 8x8 blocks of a simdgroup
  typedef tile_weights<F, K, HALF> stream;
  stream incoming;
  vec<T, 4> ahead[BM / 8];  // activations of two steps, a line of a row in bfloat16
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
    if (k0 % stream::PIECE == 0) incoming.load(weights, n_rows, k0, packed, thread_index);
    MLX_MTL_PRAGMA_UNROLL
    for (int n = 0; n < BM / 16; n++) {
      int row = thread_index / 8 + 16 * n, octet_index = thread_index % 8;
      if (k0 % (2 * BK) == 0) {
        MLX_MTL_PRAGMA_UNROLL
        for (int h = 0; h < 2; h++) {
          int k = k0 + 8 * octet_index + 4 * h;
          float4 v = float4(0.0f, 0.0f, 0.0f, 0.0f);
          if (row < n_x && k < K) v = x.four(row, k);
          ahead[2 * n + h] = vec<T, 4>(T(v.x), T(v.y), T(v.z), T(v.w));
        }
      }
      if (octet_index / 4 != k0 / BK % 2) continue;
      MLX_MTL_PRAGMA_UNROLL
      for (int h = 0; h < 2; h++) {
        vec<T, 4> v = ahead[2 * n + h];
        xs[row * TILE_STRIDE / 4 + 2 * (octet_index % 4) + h] =
            float4(float(v.x), float(v.y), float(v.z), float(v.w));
      }
    }
    if (k0 % stream::PIECE == 0) threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int i = thread_index; i < BN * BK / 8; i += THREADS) {
      int row = i / (BK / 8), k = k0 + 8 * (i % (BK / 8));
      float4 lo = float4(0.0f, 0.0f, 0.0f, 0.0f), hi = lo;
      if (row % HALF < n_rows && k < K) {
        uint at = stream::piece_at(weights, row, k), octet_index = uint(k % stream::PIECE) / 8;
        octet w = octet_at<F>((threadgroup const uint*)packed, at, octet_index, points);
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
