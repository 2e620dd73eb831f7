// inputs: h records slots order tiles shared_down n_positions
// outputs: terms
// The down maps for the positions of a prompt, tile by tile as in moe_matmul_gate_up: each choice's
// own result, terms [positions, KTOP + 1, D], which dense_add sums in order.
#include "matmul.h"

template <typename T, int I> struct hidden_rows {
  device const T* values;
  threadgroup const int* places;
  float4 four(int r, int k) const {
    vec<T, 4> v = *(device const vec<T, 4>*)(values + ulong(places[r]) * I + k);
    return float4(float(v.x), float(v.y), float(v.z), float(v.w));
  }
};

// body
constexpr int PLACES = KTOP + 1;
constexpr bool HAS_POINTS = FE == FORMAT_IQ2_XXS || FS == FORMAT_IQ2_XXS;
threadgroup float4 products[tile_words(BM)];
threadgroup uint4 packed[packed_words(FE == FORMAT_Q6_K || FS == FORMAT_Q6_K)];
threadgroup uint2 points[HAS_POINTS ? 256 : 1];
threadgroup int places[BM];
uint sg = simdgroup_index_in_threadgroup, lane = thread_index_in_simdgroup;
int thread_index = int(32 * sg + lane);
int first = int(threadgroup_position_in_grid.x) * BN, n_rows = smaller(BN, D - first);
int tile = int(threadgroup_position_in_grid.y), n_tiles = (n_positions[0] * KTOP + BM - 1) / BM + E;
bool routed = tile < n_tiles;
int begin = routed ? tiles[3 * tile + 1] : (tile - n_tiles) * BM;
int n = routed ? tiles[3 * tile + 2] : smaller(BM, n_positions[0] - begin);
if (n == 0) return;

for (int i = thread_index; i < n; i += 32 * MATMUL_SIMDGROUPS) {
  int pair = routed ? order[begin + i] : 0;
  places[i] = routed ? pair / KTOP * PLACES + pair % KTOP : (begin + i) * PLACES + KTOP;
}
if (HAS_POINTS) {
  for (int i = thread_index; i < 256; i += 32 * MATMUL_SIMDGROUPS) points[i] = iq2_xxs_point(i);
}
hidden_rows<T, I> input = {h, places};
weight_rows<1> rows;
threadgroup_barrier(mem_flags::mem_threadgroup);
if (routed) {
  rows.words[0] = (device const uint4*)records;
  rows.size[0] = ulong(records_shape[0]) * RECORD;
  rows.start[0] = ulong(slots[order[begin]]) * RECORD + DOWN + ulong(first) * row_bytes(FE, I);
  tile_matmul<FE, I, BM, BN, T>(rows, n_rows, input, n, products, packed, points, sg,
                                 lane);
} else {
  rows.words[0] = (device const uint4*)shared_down;
  rows.size[0] = ulong(D) * row_bytes(FS, I);
  rows.start[0] = ulong(first) * row_bytes(FS, I);
  tile_matmul<FS, I, BM, BN, T>(rows, n_rows, input, n, products, packed, points, sg,
                                 lane);
}
threadgroup const float* out = (threadgroup const float*)products;
for (int i = thread_index; i < n * BN; i += 32 * MATMUL_SIMDGROUPS) {
  int r = i / BN, c = i % BN;
  if (c < n_rows) terms[ulong(places[r]) * D + first + c] = out[r * OUT_STRIDE + c];
}
