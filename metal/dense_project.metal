// inputs: x norm_weight eps w0 w1 w2 w3 w4 w5 w6 w7
// outputs: y
// Up to eight matrices that share an input, whatever their formats, for one to eight rows of it; or
// one matrix per group of channels. Optionally the input is rms-normed first.
//
// Threadgroups take tiles of rows, matrix after matrix: the launch ends when the last tile does, so
// that small matrices (router, indexer weights) fill the gaps that large ones leave.
#include "matvec.h"

template <typename TX, typename TN, int STRIDE, bool NORM> struct projected_input {
  device const TX* values;
  device const TN* norm;
  threadgroup const float* inverse_rms;
  float4 load(int s, int k) const {
    vec<TX, 4> v = *(device const vec<TX, 4>*)(values + s * STRIDE + k);
    return float4(float(v.x), float(v.y), float(v.z), float(v.w));
  }
  float4 four(int s, int k) const {
    float4 v = load(s, k);
    if (!NORM) return v;
    float4 weight = float4(float(norm[k]), float(norm[k + 1]), float(norm[k + 2]), float(norm[k + 3]));
    return v * inverse_rms[s] * weight;
  }
};

// body
constexpr int TILE = NSG * ROWS;
constexpr bool HAS_POINTS = F0 == FORMAT_IQ2_XXS || F1 == FORMAT_IQ2_XXS || F2 == FORMAT_IQ2_XXS ||
    F3 == FORMAT_IQ2_XXS || F4 == FORMAT_IQ2_XXS || F5 == FORMAT_IQ2_XXS || F6 == FORMAT_IQ2_XXS ||
    F7 == FORMAT_IQ2_XXS;
threadgroup vec<T, 4> xs[S * KC / 4];
threadgroup uint4 stage[NSG * STAGE_WORDS / 4];
threadgroup uint2 points[HAS_POINTS ? 256 : 1];
threadgroup float out[S * TILE];
threadgroup float inverse_rms[S];
uint sg = simdgroup_index_in_threadgroup, lane = thread_index_in_simdgroup;

int tile = int(threadgroup_position_in_grid.x), column = 0, n = N0, format = F0;
int n_tiles = (N0 + TILE - 1) / TILE;
device const uint8_t* matrix = w0;
#define NEXT_MATRIX(w, N, F)             \
  if (GROUPS == 1 && tile >= n_tiles) {  \
    tile -= n_tiles;                     \
    column += n;                         \
    matrix = w;                          \
    n = N;                               \
    format = F;                          \
    n_tiles = (N + TILE - 1) / TILE;     \
  }
NEXT_MATRIX(w1, N1, F1)
NEXT_MATRIX(w2, N2, F2)
NEXT_MATRIX(w3, N3, F3)
NEXT_MATRIX(w4, N4, F4)
NEXT_MATRIX(w5, N5, F5)
NEXT_MATRIX(w6, N6, F6)
NEXT_MATRIX(w7, N7, F7)
int group = 0;
if (GROUPS > 1) {
  group = tile / n_tiles;
  tile %= n_tiles;
  column = group * N0;
}
int first = tile * TILE, n_rows = smaller(TILE, n - first);

projected_input<TX, TN, XSTRIDE, NORM> input = {x + XOFF + group * K, norm_weight, inverse_rms};
if (NORM) {
  for (int s = int(sg); s < S; s += NSG) {
    float sum = 0.0f;
    for (int k = 4 * int(lane); k < K; k += 128) {
      float4 v = input.load(s, k);
      sum = fma(v.x, v.x, fma(v.y, v.y, fma(v.z, v.z, fma(v.w, v.w, sum))));
    }
    sum = simd_sum(sum);
    if (lane == 0) inverse_rms[s] = 1.0f / sqrt(sum / float(K) + eps[0]);
  }
}
if (HAS_POINTS) {
  for (uint i = 32 * sg + lane; i < 256; i += 32 * NSG) points[i] = iq2_xxs_point(i);
}
// The barrier behind which the activations are staged covers both.
weight_rows<1> rows;
rows.words[0] = (device const uint4*)matrix;
#define USED(F) \
  (F0 == F || F1 == F || F2 == F || F3 == F || F4 == F || F5 == F || F6 == F || F7 == F)
#define RUN(F)                                                                                    \
  if (USED(F) && format == F) {                                                                   \
    constexpr int FORMAT = USED(F) ? F : F0;                                                      \
    rows.size[0] = ulong(n) * GROUPS * row_bytes(FORMAT, K);                                      \
    rows.start[0] = ulong(group * n + first) * row_bytes(FORMAT, K);                              \
    tile_dot<FORMAT, K, KC, S, ROWS, NSG, 1, T>(rows, n_rows, input, S, xs,                       \
                                                (threadgroup uint*)stage, points, out, sg, lane); \
  }
RUN(FORMAT_F32) RUN(FORMAT_F16) RUN(FORMAT_BF16) RUN(FORMAT_FP8) RUN(FORMAT_Q8_0) RUN(FORMAT_Q2_K)
RUN(FORMAT_Q4_K) RUN(FORMAT_Q6_K) RUN(FORMAT_IQ2_XXS) RUN(FORMAT_MXFP4)
threadgroup_barrier(mem_flags::mem_threadgroup);
constexpr int TOTAL = GROUPS > 1 ? GROUPS * N0 : N0 + N1 + N2 + N3 + N4 + N5 + N6 + N7;
for (int i = int(32 * sg + lane); i < S * TILE; i += 32 * NSG) {
  int s = i / TILE, r = i % TILE;
  if (r < n_rows) y[s * TOTAL + column + first + r] = out[i];
}
