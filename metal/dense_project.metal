// inputs: x norm_weight eps w0 w1 w2 w3 w4 w5 w6 w7
// outputs: y
// Up to eight matrices that share an input, whatever their formats, for one to eight rows of it; or
// one matrix per group of channels. Optionally the input is rms-normed first.
//
// Threadgroups take tiles of rows, matrix after matrix: the launch ends when the last tile does, so
// that small matrices (router, indexer weights) fill the gaps that large ones leave.
#include "matvec.h"
#include "parts.h"

// body
constexpr int TILE = NSG * ROWS;
constexpr bool HAS_POINTS = USED(FORMAT_IQ2_XXS);
threadgroup vec<T, 4> xs[S * KC / 4];
threadgroup uint4 stage[NSG * stage_words(S) / 4];
threadgroup uint2 points[HAS_POINTS ? 256 : 1];
threadgroup float out[S * TILE];
threadgroup float inverse_rms[S];
uint sg = simdgroup_index_in_threadgroup, lane = thread_index_in_simdgroup;
FIND_TILE(threadgroup_position_in_grid.x)
int n_rows = smaller(TILE, n - first);

// Inputs to be normed are read once where they fit the stages, which no weights have reached yet.
projected_input<TX, TN, K, NORM, S * K <= NSG * stage_words(S)> input = {
    x + XOFF + group * K, XSTRIDE, norm_weight, inverse_rms, (threadgroup float4*)stage};
if (NORM) input.measure(S, eps[0], inverse_rms, NSG, sg, lane);
if (HAS_POINTS) {
  for (uint i = 32 * sg + lane; i < 256; i += 32 * NSG) points[i] = iq2_xxs_point(i);
}
// The barrier behind which the activations are staged covers both.
weight_rows<1> rows;
rows.words[0] = (device const uint4*)matrix;
#define RUN(F)                                                                                    \
  if (USED(F) && format == F) {                                                                   \
    constexpr int FORMAT = USED(F) ? F : F0;                                                      \
    rows.size[0] = ulong(n) * GROUPS * row_bytes(FORMAT, K);                                      \
    rows.start[0] = ulong(group * n + first) * row_bytes(FORMAT, K);                              \
    tile_dot<FORMAT, K, KC, S, ROWS, NSG, 1, T>(rows, n_rows, input, S, xs,                       \
                                                (threadgroup uint*)stage, points, out, sg, lane); \
  }
FOR_EACH_FORMAT(RUN)
threadgroup_barrier(mem_flags::mem_threadgroup);
for (int i = int(32 * sg + lane); i < S * TILE; i += 32 * NSG) {
  int s = i / TILE, r = i % TILE;
  if (r < n_rows) y[s * RESULT_COLUMNS + column + first + r] = TY(out[i]);
}
