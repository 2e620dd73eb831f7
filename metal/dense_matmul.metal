// inputs: x norm_weight eps n_positions w0 w1 w2 w3 w4 w5 w6 w7
// outputs: y
// What dense_project computes, for any number of rows: the positions of a prompt.
//
// Tiles of positions are the grid's first axis, so that those that share a tile of weights run
// together and its bytes come from memory once.
#include "matmul.h"
#include "parts.h"

// body
constexpr int TILE = BN;
constexpr bool HAS_POINTS = USED(FORMAT_IQ2_XXS);
threadgroup float4 tiles[tile_words(BM)];
threadgroup uint4 packed[packed_words(USED(FORMAT_Q6_K))];
threadgroup uint2 points[HAS_POINTS ? 256 : 1];
threadgroup float inverse_rms[BM];
uint sg = simdgroup_index_in_threadgroup, lane = thread_index_in_simdgroup;
FIND_TILE(threadgroup_position_in_grid.y)
int n_rows = smaller(BN, n - first);
int position = int(threadgroup_position_in_grid.x) * BM;
int n_x = smaller(BM, n_positions[0] - position);

projected_input<TX, TN, K, NORM, false> input = {
    x + ulong(position) * XSTRIDE + XOFF + group * K, XSTRIDE, norm_weight, inverse_rms, tiles};
if (NORM) input.measure(n_x, eps[0], inverse_rms, MATMUL_SIMDGROUPS, sg, lane);
if (HAS_POINTS) {
  for (uint i = 32 * sg + lane; i < 256; i += 32 * MATMUL_SIMDGROUPS) points[i] = iq2_xxs_point(i);
}
weight_rows<1> rows;
rows.words[0] = (device const uint4*)matrix;
#define RUN(F)                                                                                    \
  if (USED(F) && format == F) {                                                                   \
    constexpr int FORMAT = USED(F) ? F : F0;                                                      \
    rows.size[0] = ulong(n) * GROUPS * row_bytes(FORMAT, K);                                      \
    rows.start[0] = ulong(group * n + first) * row_bytes(FORMAT, K);                              \
    tile_matmul<FORMAT, K, BM, BN, T>(rows, n_rows, input, n_x, tiles, packed, points, sg, lane); \
  }
FOR_EACH_FORMAT(RUN)
threadgroup const float* out = (threadgroup const float*)tiles;
for (int i = int(32 * sg + lane); i < n_x * BN; i += 32 * MATMUL_SIMDGROUPS) {
  int r = i / BN, c = i % BN;
  if (c < n_rows) {
    y[ulong(position + r) * RESULT_COLUMNS + column + first + c] = TY(out[r * OUT_STRIDE + c]);
  }
}
