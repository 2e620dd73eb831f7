// The matrices of a launch: w0..w7 with N0..N7 rows (per group) in the formats F0..F7, taken in
// tiles of TILE rows. Leaves in scope: `matrix`, `n`, `format`, `column` (the matrix's first in the
// result), `group`, and `first`, the tile's first row of the matrix.

#define MATRIX_TILES(N) ((N + TILE - 1) / TILE)
#define NEXT_MATRIX(w, N, F)             \
  if (GROUPS == 1 && tile >= n_tiles) {  \
    tile -= n_tiles;                     \
    column += n;                         \
    matrix = w;                          \
    n = N;                               \
    format = F;                          \
    n_tiles = MATRIX_TILES(N);           \
  }
#define FIND_TILE(index)                                                          \
  int tile = int(index), column = 0, n = N0, format = F0, n_tiles = MATRIX_TILES(N0), group = 0; \
  device const uint8_t* matrix = w0;                                              \
  NEXT_MATRIX(w1, N1, F1)                                                         \
  NEXT_MATRIX(w2, N2, F2)                                                         \
  NEXT_MATRIX(w3, N3, F3)                                                         \
  NEXT_MATRIX(w4, N4, F4)                                                         \
  NEXT_MATRIX(w5, N5, F5)                                                         \
  NEXT_MATRIX(w6, N6, F6)                                                         \
  NEXT_MATRIX(w7, N7, F7)                                                         \
  if (GROUPS > 1) {                                                               \
    group = tile / n_tiles;                                                       \
    tile %= n_tiles;                                                              \
    column = group * N0;                                                          \
  }                                                                               \
  int first = tile * TILE;

#define RESULT_COLUMNS (GROUPS > 1 ? GROUPS * N0 : N0 + N1 + N2 + N3 + N4 + N5 + N6 + N7)

// Whether a matrix has the format F; RUN(F) is compiled for those that one has.
#define USED(F) \
  (F0 == F || F1 == F || F2 == F || F3 == F || F4 == F || F5 == F || F6 == F || F7 == F)
#define FOR_EACH_FORMAT(RUN)                                                            \
  RUN(FORMAT_F32) RUN(FORMAT_F16) RUN(FORMAT_BF16) RUN(FORMAT_FP8) RUN(FORMAT_Q8_0)     \
  RUN(FORMAT_Q2_K) RUN(FORMAT_Q4_K) RUN(FORMAT_Q6_K) RUN(FORMAT_IQ2_XXS) RUN(FORMAT_MXFP4)

// HELD: the rows' inputs, K floats each, are in `held` once `measure` has read them.
template <typename TX, typename TN, int K, bool NORM, bool HELD> struct projected_input {
  device const TX* values;
  ulong stride;
  device const TN* norm;
  threadgroup const float* inverse_rms;
  threadgroup float4* held;
  float4 load(int s, int k) const {
    vec<TX, 4> v = *(device const vec<TX, 4>*)(values + s * stride + k);
    return float4(float(v.x), float(v.y), float(v.z), float(v.w));
  }
  float4 four(int s, int k) const {
    if (!NORM) return load(s, k);
    float4 v;
    if (HELD) {
      v = held[(s * K + k) / 4];
    } else {
      v = load(s, k);
    }
    float4 weight = float4(float(norm[k]), float(norm[k + 1]), float(norm[k + 2]),
                           float(norm[k + 3]));
    return v * inverse_rms[s] * weight;
  }
  // 1 / sqrt(mean(x^2) + eps) of n_x rows, a simdgroup for each; complete after the next barrier.
  void measure(int n_x, float eps, threadgroup float* result, int n_simdgroups, uint sg,
               uint lane) const {
    for (int s = int(sg); s < n_x; s += n_simdgroups) {
      float sum = 0.0f;
      for (int k = 4 * int(lane); k < K; k += 128) {
        float4 v = load(s, k);
        if (HELD) held[(s * K + k) / 4] = v;
        sum = fma(v.x, v.x, fma(v.y, v.y, fma(v.z, v.z, fma(v.w, v.w, sum))));
      }
      sum = simd_sum(sum);
      if (lane == 0) result[s] = 1.0f / sqrt(sum / float(K) + eps);
    }
  }
};
