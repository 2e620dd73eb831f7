// Products of a tile of weight rows with one to eight activation rows.
//
// A step of decoding is bound by the weights' bytes, so the plan is built around reading each of
// them once, in whole lines:
// - A simdgroup owns ROWS neighbouring rows and reads them R at a time. Lanes load 16-byte words,
//   in whole lines of 128 bytes, whatever the format's blocks are: of R rows as one range where
//   that is little, else of each row piece by piece. The bytes of a piece's last line that belong
//   to the next piece stay in registers until it comes.
// - The bytes go through threadgroup memory, where each lane picks out its octet. Blocks of 17, 34,
//   66 or 210 bytes would otherwise make a simdgroup's loads straddle lines.
// - The next bytes are on their way to registers (about 2.3 KB a simdgroup, 18 KB a threadgroup)
//   while these are used; that, not many resident simdgroups, is what hides the memory's latency.
// - Activations are staged in threadgroup memory once per threadgroup and used by all its rows.
//
// A lane's sum runs over its octets in ascending order and the lanes are summed by simd_sum: the
// order depends on the length of the row alone, not on how many rows are computed, how rows are
// spread over simdgroups, or how much of them is staged at a time.

#include "formats.h"
#include "lines.h"

// Bytes of threadgroup memory where a simdgroup stages weights. With one or two activation rows
// eight simdgroups have to fit beside them.
constexpr int stage_bytes(int n_x) { return n_x > 2 ? 2816 : 2432; }
constexpr int stage_words(int n_x) { return stage_bytes(n_x) / 4; }

// Bytes staged for a range of n bytes that begins anywhere in a 16-byte word: alone, or as a piece
// whose last line comes with it.
constexpr int range_room(int n) { return (n + 30) / 16 * 16; }
constexpr int piece_room(int n) { return (n + LINE - 1 + 30) / 16 * 16; }

// Whether r rows are read as one range: not when another matrix's bytes would have to be staged
// before all of them are used.
constexpr bool read_whole(int format, int k, int staged, int n_x, int n_matrices, int r) {
  return range_room(r * row_bytes(format, k)) <= stage_bytes(n_x) &&
      (staged >= k || n_matrices == 1);
}

// A row whose first and last line, shared with its neighbours, are over a tenth of what is read.
constexpr bool is_short(int n_bytes) {
  return n_bytes < 9 * (LINE - smaller(n_bytes & -n_bytes, LINE));
}

// Rows read together: four if they are read whole. Activations are read again for each octet of a
// row, so with more than two activation rows an octet of them must serve two weight rows, with more
// than four four, or threadgroup memory would be busier than the memory behind it.
constexpr int rows_together(int format, int k, int staged, int n_x, int n_matrices, int rows) {
  return smaller(
      rows,
      read_whole(format, k, staged, n_x, n_matrices, 4) ? 4
          : n_x > 4 && 4 * piece_room(row_bytes(format, 256)) <= stage_bytes(n_x) &&
              !is_short(row_bytes(format, k)) ? 4
          : n_x > 2 || read_whole(format, k, staged, n_x, n_matrices, 2) ? 2
                                                                         : 1);
}

// Values of a row read together where r rows are not read whole: units that the stage has room for.
constexpr int piece_values(int format, int n_x, int r) {
  int units = 1;
  while (r * piece_room(row_bytes(format, 256 * (units + 1))) <= stage_bytes(n_x)) units++;
  return 256 * units;
}

// Weights on their way from device memory through registers to threadgroup memory: values p0..p1 of
// rows `row`..`row + n`, n <= R. KC values of a row are used at a time.
template <int F, int K, int KC, int NX, int M, int R> struct weight_stream {
  enum {
    ROW = row_bytes(F, K),
    WHOLE = read_whole(F, K, KC, NX, M, R),
    RANGES = WHOLE ? 1 : R,
    RANGE = WHOLE ? R * ROW : ROW,
    PIECE = WHOLE ? K : smaller(piece_values(F, NX, R), KC),
    CARRIES = !WHOLE && PIECE < K,
    MOST = WHOLE ? RANGE : row_bytes(F, PIECE),  // bytes of a piece
    ROOM = CARRIES ? piece_room(MOST) : range_room(MOST),
    WORDS = (MOST + 2 * (LINE - 1)) / LINE * (LINE / 16),  // of a piece's lines
    LOADS = (RANGES * WORDS + 31) / 32
  };
  uint4 loaded[LOADS];
  uint4 carried[M];  // lane 8 * q + w: word w of the line that ends range q's last piece

  // Of range q: the piece's first byte, the first word that is not carried, and the first byte that
  // is not loaded.
  struct extent { ulong begin, from, end; };
  static extent extent_of(ulong start, int row, int n, int q, int p0, int p1) {
    ulong range = start + ulong(row + q) * ROW;
    extent e;
    e.begin = range + row_bytes(F, p0);
    e.from = p0 == 0 ? line_of(e.begin) : line_of(e.begin + LINE - 1);
    e.end = range + (WHOLE ? ulong(n) * ROW : ROW);
    if (CARRIES) e.end = min(e.end, line_of(range + row_bytes(F, p1) + LINE - 1));
    return e;
  }

  void fetch(device const uint4* words, ulong size, ulong start, int row, int n, int p0, int p1,
             uint lane) {
    MLX_MTL_PRAGMA_UNROLL
    for (int i = 0; i < LOADS; i++) {
      int word = int(lane) + 32 * i, q = RANGES == 1 ? 0 : word / WORDS;
      extent e = extent_of(start, row, n, q, p0, p1);
      ulong at = e.from + 16 * (word - q * WORDS);
      if (q < smaller(n, RANGES) && at + 16 > e.begin && at < e.end) {
        loaded[i] = word_of_16(words, size, at);
      }
    }
  }

  void commit(threadgroup uint4* own, ulong start, int row, int n, int m, int p0, int p1,
              uint lane) {
    MLX_MTL_PRAGMA_UNROLL
    for (int i = 0; i < LOADS; i++) {
      int word = int(lane) + 32 * i, q = RANGES == 1 ? 0 : word / WORDS;
      extent e = extent_of(start, row, n, q, p0, p1);
      ulong at = e.from + 16 * (word - q * WORDS);
      if (q < smaller(n, RANGES) && at + 16 > e.begin && at < e.end) {
        own[place(e.begin, q, at)] = loaded[i];
      }
    }
    if (CARRIES && p0 > 0) {
      int q = int(lane) / 8;
      extent e = extent_of(start, row, n, q, p0, p1);
      ulong at = e.from - LINE + 16 * (lane % 8);
      if (q < smaller(n, R) && at + 16 > e.begin && at < e.end) {
        own[place(e.begin, q, at)] = carried[m];
      }
    }
  }

  // Takes out of the stage what the piece after p1 begins with.
  void keep(threadgroup const uint4* own, ulong start, int row, int n, int m, int p0, int p1,
            uint lane) {
    if (!CARRIES || p1 == K) return;
    int q = int(lane) / 8;
    extent e = extent_of(start, row, n, q, p0, p1);
    ulong next = extent_of(start, row, n, q, p1, K).begin;
    ulong at = line_of(next + LINE - 1) - LINE + 16 * (lane % 8);
    if (q < smaller(n, R) && at + 16 > next && at < e.end) carried[m] = own[place(e.begin, q, at)];
  }

  // Where word `at` of range q lies in the stage, whose piece begins at `begin`.
  static uint place(ulong begin, int q, ulong at) {
    return uint(q * ROOM) / 16 + uint((at >> 4) - (begin >> 4));
  }

  // Where value k of row r lies in the stage, in bytes; k - p0 is a multiple of 256.
  static uint value_at(ulong start, int row, int r, int p0, int k) {
    return WHOLE ? uint((start + ulong(row) * ROW) & 15) + r * ROW + row_bytes(F, k)
                 : uint((start + ulong(row + r) * ROW + row_bytes(F, p0)) & 15) + r * ROOM +
            row_bytes(F, k - p0);
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
// xs: NX * KC / 4, stage: NSG * stage_words(NX), out: M * NX * TILE elements.
template <int F, int K, int KC, int NX, int ROWS, int NSG, int M, typename T, typename X>
inline void tile_dot(weight_rows<M> w, int n_rows, X x, int n_x, threadgroup vec<T, 4>* xs,
                     threadgroup uint* stage, threadgroup const uint2* points,
                     threadgroup float* out, uint sg, uint lane) {
  constexpr int R = rows_together(F, K, KC, NX, M, ROWS), PASSES = ROWS / R;
  typedef weight_stream<F, K, KC, NX, M, R> stream;
  threadgroup uint* own = stage + sg * stage_words(NX);
  int first_row = int(sg) * ROWS;
  stream incoming;
  piece_cursor<K, stream::WHOLE ? K : KC, stream::PIECE, M> at = {0, 0, 0, 0};
  incoming.fetch(w.words[0], w.size[0], w.start[0], first_row, clamp(n_rows - first_row, 0, R), 0,
                 at.p1(), lane);
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
          if (!stream::WHOLE || p0 == 0) {
            incoming.commit((threadgroup uint4*)own, w.start[m], row, n, m, p0, p1, lane);
            simdgroup_barrier(mem_flags::mem_threadgroup);
            incoming.keep((threadgroup const uint4*)own, w.start[m], row, n, m, p0, p1, lane);
            at.next();
            if (at.pass < PASSES) {
              int to = first_row + at.pass * R;
              incoming.fetch(w.words[at.m], w.size[at.m], w.start[at.m], to,
                             clamp(n_rows - to, 0, R), at.p0, at.p1(), lane);
            }
          }
          for (int unit = p0; n > 0 && unit < p1; unit += 256) {
            int k = unit + 8 * int(lane);
            if (k >= p1) break;
            octet weights[R];
            MLX_MTL_PRAGMA_UNROLL
            for (int r = 0; r < R; r++) {  // a row beyond the last is the last once more
              uint values = stream::value_at(w.start[m], row, smaller(r, n - 1), p0, unit);
              weights[r] = octet_at<F>((threadgroup const uint*)own, values, lane, points);
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
