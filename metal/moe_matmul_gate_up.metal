// inputs: x records slots pair_weights order tiles shared_gate shared_up limit n_positions
// outputs: h
// What moe_gate_up computes, for the positions of a prompt, grouped by expert by moe_group. The
// second axis of the grid counts its tiles and then those of the shared expert, which takes all
// positions; an unused tile ends at once. A tile of weights is 32 rows of gate and the same of up.
#include "matmul.h"

template <typename T, int D, int PLACES> struct expert_rows {
  device const T* values;
  threadgroup const int* places;
  float4 four(int r, int k) const {
    vec<T, 4> v = *(device const vec<T, 4>*)(values + ulong(places[r] / PLACES) * D + k);
    return float4(float(v.x), float(v.y), float(v.z), float(v.w));
  }
};

// body
constexpr int HALF = BN / 2, PLACES = KTOP + 1;
constexpr bool HAS_POINTS = FE == FORMAT_IQ2_XXS || FS == FORMAT_IQ2_XXS;
threadgroup float4 products[tile_words(BM)];
threadgroup uint4 packed[packed_words(FE == FORMAT_Q6_K || FS == FORMAT_Q6_K)];
threadgroup uint2 points[HAS_POINTS ? 256 : 1];
threadgroup int places[BM];
uint sg = simdgroup_index_in_threadgroup, lane = thread_index_in_simdgroup;
int thread_index = int(32 * sg + lane);
int first = int(threadgroup_position_in_grid.x) * HALF, n_rows = smaller(HALF, I - first);
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
expert_rows<T, D, PLACES> input = {x, places};
weight_rows<BN / HALF> rows;
threadgroup_barrier(mem_flags::mem_threadgroup);
if (routed) {
  ulong record = ulong(slots[order[begin]]) * RECORD, skip = ulong(first) * row_bytes(FE, D);
  rows.words[0] = rows.words[1] = (device const uint4*)records;
  rows.size[0] = rows.size[1] = ulong(records_shape[0]) * RECORD;
  rows.start[0] = record + GATE + skip;
  rows.start[1] = record + UP + skip;
  tile_matmul<FE, D, BM, HALF, T>(rows, n_rows, input, n, products, packed, points, sg,
                                 lane);
} else {
  rows.words[0] = (device const uint4*)shared_gate;
  rows.words[1] = (device const uint4*)shared_up;
  rows.size[0] = rows.size[1] = ulong(I) * row_bytes(FS, D);
  rows.start[0] = rows.start[1] = ulong(first) * row_bytes(FS, D);
  tile_matmul<FS, D, BM, HALF, T>(rows, n_rows, input, n, products, packed, points, sg,
                                 lane);
}
threadgroup const float* out = (threadgroup const float*)products;
for (int i = thread_index; i < n * HALF; i += 32 * MATMUL_SIMDGROUPS) {
  int r = i / HALF, c = i % HALF, place = places[r], j = place % PLACES;
  if (c >= n_rows) continue;
  float weight = j < KTOP ? pair_weights[place / PLACES * KTOP + j] : 1.0f;
  float gate = min(out[r * OUT_STRIDE + c], limit[0]);
  float up = clamp(out[r * OUT_STRIDE + HALF + c], -limit[0], limit[0]);
  h[ulong(place) * I + first + c] = T(gate / (1.0f + exp(-gate)) * up * weight);
}
