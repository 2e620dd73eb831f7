// inputs: x records slots pair_weights shared_gate shared_up limit
// outputs: h
// The first half of the experts' feed-forward: weight * silu(min(gate, limit)) * clip(up, limit)
// for each row's chosen experts and the shared one, in one launch. Row r of an expert's gate and of
// its up map belong to the same simdgroup, which has both products at hand.
//
// Grid: the tiles of the shared expert, which has more bytes and so fewer rows to a tile, then
// those of each (row, choice). Where the rows chose different experts, which is the rule, an entry
// is one row and all of its input is staged at once.
#include "matvec.h"
#include "experts.h"

template <typename T, int D, int PLACES> struct expert_input {
  device const T* values;
  threadgroup const int* places;
  float4 four(int s, int k) const {
    vec<T, 4> v = *(device const vec<T, 4>*)(values + places[s] / PLACES * D + k);
    return float4(float(v.x), float(v.y), float(v.z), float(v.w));
  }
};

// body
constexpr int TILE = NSG * ROWS, SHARED_TILE = NSG * SHARED_ROWS;
constexpr int TILES = (I + TILE - 1) / TILE, SHARED_TILES = (I + SHARED_TILE - 1) / SHARED_TILE;
constexpr bool HAS_POINTS = FE == FORMAT_IQ2_XXS || FS == FORMAT_IQ2_XXS;
threadgroup vec<T, 4> xs[(S * KC > K1 ? S * KC : K1) / 4];
threadgroup uint4 stage[NSG * stage_words(S) / 4];
threadgroup uint2 points[HAS_POINTS ? 256 : 1];
threadgroup float out[2 * S * TILE];
threadgroup int chosen[S * KTOP];
threadgroup int places[S];
uint sg = simdgroup_index_in_threadgroup, lane = thread_index_in_simdgroup;
int tile = int(threadgroup_position_in_grid.x) - SHARED_TILES;
bool is_shared = tile < 0;
int entry = is_shared ? S * KTOP : tile / TILES, width = is_shared ? SHARED_TILE : TILE;
int first = is_shared ? (tile + SHARED_TILES) * SHARED_TILE : tile % TILES * TILE;
int n_rows = smaller(width, I - first);
bool writes = sg == 0 && lane == 0;

for (int i = int(32 * sg + lane); i < S * KTOP; i += 32 * NSG) chosen[i] = slots[i];
if (HAS_POINTS) {
  for (uint i = 32 * sg + lane; i < 256; i += 32 * NSG) points[i] = iq2_xxs_point(i);
}
threadgroup_barrier(mem_flags::mem_threadgroup);

expert_input<T, D, KTOP + 1> input = {x, places};
weight_rows<2> rows;
int n = S, together = S;
if (is_shared) {
  if (writes) {
    for (int s = 0; s < S; s++) places[s] = s * (KTOP + 1) + KTOP;
  }
  rows.words[0] = (device const uint4*)shared_gate;
  rows.words[1] = (device const uint4*)shared_up;
  rows.size[0] = rows.size[1] = ulong(I) * row_bytes(FS, D);
  rows.start[0] = rows.start[1] = ulong(first) * row_bytes(FS, D);
  tile_dot<FS, D, KC, S, SHARED_ROWS, NSG, 2, T>(rows, n_rows, input, n, xs,
                                                 (threadgroup uint*)stage, points, out, sg, lane);
} else {
  n = share_slot<S, KTOP>(chosen, entry, places, writes);
  if (n == 0) return;
  ulong record = ulong(chosen[entry]) * RECORD;
  rows.words[0] = rows.words[1] = (device const uint4*)records;
  rows.size[0] = rows.size[1] = ulong(SLOTS) * RECORD;
  rows.start[0] = record + GATE + ulong(first) * row_bytes(FE, D);
  rows.start[1] = record + UP + ulong(first) * row_bytes(FE, D);
  if (S > 1 && n == 1) {
    together = 1;
    tile_dot<FE, D, K1, 1, ROWS, NSG, 2, T>(rows, n_rows, input, n, xs, (threadgroup uint*)stage,
                                            points, out, sg, lane);
  } else {
    tile_dot<FE, D, KC, S, ROWS, NSG, 2, T>(rows, n_rows, input, n, xs, (threadgroup uint*)stage,
                                            points, out, sg, lane);
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
for (int i = int(32 * sg + lane); i < n * width; i += 32 * NSG) {
  int s = i / width, r = i % width, place = places[s], j = place % (KTOP + 1);
  if (r >= n_rows) continue;
  float weight = j < KTOP ? pair_weights[place / (KTOP + 1) * KTOP + j] : 1.0f;
  float gate = min(out[i], limit[0]);
  float up = clamp(out[together * width + i], -limit[0], limit[0]);
  h[place * I + first + r] = T(gate / (1.0f + exp(-gate)) * up * weight);
}
