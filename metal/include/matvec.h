// Products of a tile of weight rows with one to eight activation rows.
//
// A step of decoding is bound by the weights' bytes, so the plan is built around reading each of
// them once, in whole lines:
// - A simdgroup owns ROWS neighbouring rows and reads them R at a time. Their bytes form one range
//   (or one range per row, where not all of a row is used at once); lanes load it in 16-byte words,
//   512 bytes at a time from the beginning of a 128-byte line, whatever the format's blocks are.
// - The range goes through threadgroup memory, where each lane picks out its octet. Blocks of 17,
//   34, 66 or 210 bytes would otherwise make a simdgroup's loads straddle lines.
// - The next range is on its way to registers (up to 2.3 KB a simdgroup, 18 KB a threadgroup) while
//   this one is used; that, not many resident simdgroups, is what hides the memory's latency.
// - Activations are staged in threadgroup memory once per threadgroup and used by all its rows.
//
// A lane's sum runs over its octets in ascending order and the lanes are summed by simd_sum: the
// order depends on the length of the row alone, not on how many rows are computed, how rows are
// spread over simdgroups, or how much of them is staged at a time.

#include "formats.h"

// Bytes of weights a simdgroup has in flight: a row of 4096 in MXFP4, Q4_K or IQ2_XXS (two), half
// of one in Q8_0.
constexpr int burst_bytes(int format) { return format == FORMAT_FP8 ? 2048 : 2304; }

// Words of threadgroup memory per simdgroup: a burst, its alignment, FP8's scales.
enum { STAGE_WORDS = 608 };

// Rows read together: as many as a burst holds whole. Activations are read again for each octet of
// a row, so with more than two activation rows an octet of them must serve two weight rows, with
// more than four four, or threadgroup memory would be busier than the memory behind it.
constexpr int rows_together(int format, int k, int n_x, int rows) {
  return smaller(rows, 4 * row_bytes(format, k) <= burst_bytes(format) ||
                         (n_x > 4 && 4 * value_bytes(format, 256) <= burst_bytes(format))
                     ? 4
                     : n_x > 2 || 2 * row_bytes(format, k) <= burst_bytes(format) ? 2
                                                                                  : 1);
}

// Values of a row read together: all k, or whole units that fit a burst.
constexpr int piece_values(int format, int k, int r) {
  return value_bytes(format, k) * r <= burst_bytes(format)
      ? k
      : 256 * (burst_bytes(format) / (r * value_bytes(format, 256)));
}

// Weights as the kernel got them: 16-byte words of an array of `size` bytes, and where the rows of
// this tile start.
template <int M> struct weight_rows {
  device const uint4* words[M];
  ulong size[M];
  ulong start[M];
};

// A range of weights on its way from device memory through registers to threadgroup memory: values
// p0..p1 of rows `row`..`row + n`, n <= R. KC values of a row are used at a time.
template <int F, int K, int KC, int R> struct weight_stream {
  enum {
    ROW = row_bytes(F, K),
    PIECE = piece_values(F, KC, R),
    WHOLE = KC >= K && R * ROW <= burst_bytes(F),
    RANGES = WHOLE ? 1 : R,
    ROOM = (value_bytes(F, PIECE) + 30) / 16 * 16,  // bytes staged per range, alignment included
    LOADS = (127 + (WHOLE ? R * ROW : value_bytes(F, PIECE)) + 511) / 512,
    // FP8's scales of KC values for R rows, at the end of the stage.
    SCALES = WHOLE || F != FORMAT_FP8 ? 0 : (KC + 127) / 128,
    SCALES_AT = 4 * STAGE_WORDS - (R * SCALES + 3) / 4 * 4
  };
  uint4 loaded[RANGES * LOADS];
  uint loaded_scales[(R * SCALES + 31) / 32 + 1];

  // First byte after `begin` that range q covers, and the byte after its last.
  static ulong begin(ulong start, int row, int q, int p0) {
    return start + ulong(row + q) * ROW + value_bytes(F, p0);
  }
  static ulong end(ulong start, int row, int q, int n, int p0, int p1) {
    return WHOLE ? start + ulong(row + n) * ROW
                 : begin(start, row, q, p0) + value_bytes(F, p1 - p0);
  }

  void fetch(device const uint4* words, ulong size, ulong start, int row, int n, int p0, int p1,
             bool first, uint lane) {
    MLX_MTL_PRAGMA_UNROLL
    for (int q = 0; q < RANGES; q++) {
      ulong a = begin(start, row, q, p0), b = end(start, row, q, n, p0, p1);
      MLX_MTL_PRAGMA_UNROLL
      for (int i = 0; i < LOADS; i++) {
        ulong at = (a & ~ulong(127)) + 16 * (lane + 32 * i);
        if (q < n && at + 16 > a && at < b) {
          if (at + 16 <= size) {
            loaded[q * LOADS + i] = words[at >> 4];
          } else {  // the array's last bytes
            uint4 tail = uint4(0, 0, 0, 0);
            device const uchar* bytes = (device const uchar*)words;
            for (uint j = 0; at + j < size; j++) {
              tail[j >> 2] |= uint(bytes[at + j]) << (8 * (j & 3));
            }
            loaded[q * LOADS + i] = tail;
          }
        }
      }
    }
    if (SCALES != 0 && first) {
      device const uchar* bytes = (device const uchar*)words;
      for (int i = int(lane); i < n * SCALES; i += 32) {
        int r = i / int(SCALES), j = i % int(SCALES);
        ulong at = start + ulong(row + r) * ROW + K + p0 / 128 + j;
        if (p0 / 128 + j < scale_bytes(F, K)) loaded_scales[i / 32] = bytes[at];
      }
    }
  }

  void commit(threadgroup uint* own, ulong start, int row, int n, int p0, int p1, bool first,
              uint lane) {
    MLX_MTL_PRAGMA_UNROLL
    for (int q = 0; q < RANGES; q++) {
      ulong a = begin(start, row, q, p0), b = end(start, row, q, n, p0, p1);
      MLX_MTL_PRAGMA_UNROLL
      for (int i = 0; i < LOADS; i++) {
        ulong at = (a & ~ulong(127)) + 16 * (lane + 32 * i);
        if (q < n && at + 16 > a && at < b) {
          uint to = uint(q * ROOM) + uint(at - (a & ~ulong(15)));
          ((threadgroup uint4*)own)[to >> 4] = loaded[q * LOADS + i];
        }
      }
    }
    if (SCALES != 0 && first) {
      for (int i = int(lane); i < n * SCALES; i += 32) {
        ((threadgroup uchar*)own)[SCALES_AT + i] = uchar(loaded_scales[i / 32]);
      }
    }
  }

  // Where row r's piece and its scales lie in the stage.
  static uint values_at(ulong start, int row, int r, int p0) {
    return WHOLE ? uint(begin(start, row, 0, p0) & 15) + r * ROW
                 : uint(begin(start, row, r, p0) & 15) + r * ROOM;
  }
  static uint scales_at(ulong start, int row, int r, int c0) {
    return WHOLE ? values_at(start, row, r, 0) + value_bytes(F, K) : SCALES_AT + r * SCALES;
  }
};

// Which piece of the tile comes next.
template <int K, int KC, int PIECE, int M> struct piece_cursor {
  int pass, c0, m, p0;
  int p1() const { return smaller(p0 + PIECE, smaller(c0 + KC, K)); }
  void next() {
    p0 += PIECE;
    if (p0 < smaller(c0 + KC, K)) return;
    m += 1;
    if (m == M) {
      m = 0;
      c0 += KC;
      if (c0 >= K) {
        c0 = 0;
        pass += 1;
      }
    }
    p0 = c0;
  }
};

// Adds to sums[r * NX + s] the products of R weight octets with an octet of each of n_x activation
// rows, KC values apart; every one in the same order.
template <int F, int R, int NX, int KC, typename T>
inline void add_octets(thread const octet* weights, threadgroup const vec<T, 4>* x, int n_x,
                       thread float* sums) {
  MLX_MTL_PRAGMA_UNROLL
  for (int s = 0; s < NX; s++) {
    if (s >= n_x) break;
    vec<T, 4> a = x[s * KC / 4], b = x[s * KC / 4 + 1];
    float4 lo = float4(float(a.x), float(a.y), float(a.z), float(a.w));
    float4 hi = float4(float(b.x), float(b.y), float(b.z), float(b.w));
    float4 pairs = lo + hi;
    float total = has_least(F) ? (pairs.x + pairs.y) + (pairs.z + pairs.w) : 0.0f;
    MLX_MTL_PRAGMA_UNROLL
    for (int r = 0; r < R; r++) {
      float sum = fma(weights[r].scale, octet_dot(weights[r], lo, hi), sums[r * NX + s]);
      sums[r * NX + s] = has_least(F) ? fma(-weights[r].least, total, sum) : sum;
    }
  }
}

// Activations k0..k1 of n_x rows, rounded to T, KC values of a row apart.
template <int KC, int NSG, typename T, typename X>
inline void stage_activations(X x, int n_x, int k0, int k1, threadgroup vec<T, 4>* xs, uint sg,
                              uint lane) {
  for (int s = 0; s < n_x; s++) {
    for (int k = k0 + 4 * int(32 * sg + lane); k < k1; k += 4 * 32 * NSG) {
      float4 v = x.four(s, k);
      xs[(s * KC + k - k0) / 4] = vec<T, 4>(T(v.x), T(v.y), T(v.z), T(v.w));
    }
  }
}

// out[(m * NX + s) * TILE + row] = dot(row of matrix m, x's row s) for the `n_rows` rows of the
// tile (TILE = ROWS * NSG at most) and the first n_x of NX activation rows. All threads of the
// threadgroup take part; out is complete after the caller's next threadgroup barrier.
//
// x.four(s, k) gives activations k..k+3 of row s; KC of a row are staged at a time.
// xs: NX * KC / 4, stage: NSG * STAGE_WORDS, out: M * NX * TILE elements.
template <int F, int K, int KC, int NX, int ROWS, int NSG, int M, typename T, typename X>
inline void tile_dot(weight_rows<M> w, int n_rows, X x, int n_x, threadgroup vec<T, 4>* xs,
                     threadgroup uint* stage, threadgroup const uint2* points,
                     threadgroup float* out, uint sg, uint lane) {
  constexpr int R = rows_together(F, K, NX, ROWS), PASSES = ROWS / R;
  typedef weight_stream<F, K, KC, R> stream;
  threadgroup uint* own = stage + sg * STAGE_WORDS;
  int first_row = int(sg) * ROWS;
  stream incoming;
  piece_cursor<K, KC, stream::PIECE, M> at = {0, 0, 0, 0};
  incoming.fetch(w.words[0], w.size[0], w.start[0], first_row, clamp(n_rows - first_row, 0, R), 0,
                 at.p1(), true, lane);
  for (int pass = 0; pass < PASSES; pass++) {
    int row = first_row + pass * R, n = clamp(n_rows - row, 0, R);
    float sums[M * R * NX];
    MLX_MTL_PRAGMA_UNROLL
    for (int i = 0; i < M * R * NX; i++) sums[i] = 0.0f;
    for (int c0 = 0; c0 < K; c0 += KC) {
      int c1 = smaller(c0 + KC, K);
      if (KC < K || pass == 0) {
        threadgroup_barrier(mem_flags::mem_threadgroup);
        stage_activations<KC, NSG, T>(x, n_x, c0, c1, xs, sg, lane);
        threadgroup_barrier(mem_flags::mem_threadgroup);
      }
      MLX_MTL_PRAGMA_UNROLL
      for (int m = 0; m < M; m++) {
        for (int p0 = c0; p0 < c1; p0 += stream::PIECE) {
          int p1 = smaller(p0 + stream::PIECE, c1);
          incoming.commit(own, w.start[m], row, n, p0, p1, p0 == c0, lane);
          simdgroup_barrier(mem_flags::mem_threadgroup);
          at.next();
          if (at.pass < PASSES) {
            int to = first_row + at.pass * R;
            incoming.fetch(w.words[at.m], w.size[at.m], w.start[at.m], to,
                           clamp(n_rows - to, 0, R), at.p0, at.p1(), at.p0 == at.c0, lane);
          }
          for (int unit = p0; n > 0 && unit < p1; unit += 256) {
            int k = unit + 8 * int(lane);
            if (k >= p1) break;
            octet weights[R];
            MLX_MTL_PRAGMA_UNROLL
            for (int r = 0; r < R; r++) {  // a row beyond the last is the last once more
              int q = smaller(r, n - 1);
              uint values = stream::values_at(w.start[m], row, q, p0) + value_bytes(F, unit - p0);
              uint scales = stream::scales_at(w.start[m], row, q, c0) +
                  uint(unit - (stream::WHOLE ? 0 : c0)) / 128;
              weights[r] = octet_at<F>((threadgroup const uint*)own, values, lane, scales, points);
            }
            add_octets<F, R, NX, KC, T>(weights, xs + (k - c0) / 4, n_x, sums + m * R * NX);
          }
          simdgroup_barrier(mem_flags::mem_threadgroup);
        }
      }
    }
    MLX_MTL_PRAGMA_UNROLL
    for (int i = 0; i < M * R * NX; i++) {
      int m = i / (R * NX), r = i / NX % R, s = i % NX;
      float sum = simd_sum(sums[i]);
      if (lane == 0 && r < n && s < n_x) out[(m * NX + s) * (ROWS * NSG) + row + r] = sum;
    }
  }
}
