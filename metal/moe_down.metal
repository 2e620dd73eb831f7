// inputs: h records slots shared_down streams gates fn
// outputs: expanded partials
// The second half of the experts' feed-forward: each row's chosen experts and the shared one,
// summed in that order, and added to the residual streams (expand.h). A threadgroup takes
// some channels of every expert of the step, so that nothing but the sum leaves it.
#include "matvec.h"
#include "expand.h"
#include "experts.h"

template <typename T, int I> struct hidden_input {
  device const T* values;
  threadgroup const int* places;
  float4 four(int s, int k) const {
    vec<T, 4> v = *(device const vec<T, 4>*)(values + places[s] * I + k);
    return float4(float(v.x), float(v.y), float(v.z), float(v.w));
  }
};

// body
constexpr int TILE = NSG * ROWS;
constexpr bool HAS_POINTS = FE == FORMAT_IQ2_XXS || FS == FORMAT_IQ2_XXS;
threadgroup vec<T, 4> xs[(S * KC > K1 ? S * KC : K1) / 4];
threadgroup uint4 stage[NSG * stage_words(S) / 4];
threadgroup uint2 points[HAS_POINTS ? 256 : 1];
threadgroup float out[S * TILE];
// Terms of the sum, then the new streams.
threadgroup float terms[S * (KTOP + 1 > H ? KTOP + 1 : H) * TILE];
threadgroup int chosen[S * KTOP];
threadgroup int places[S];
uint sg = simdgroup_index_in_threadgroup, lane = thread_index_in_simdgroup;
int group = int(threadgroup_position_in_grid.x);
int first = group * TILE, n_rows = smaller(TILE, D - first);
bool writes = sg == 0 && lane == 0;

for (int i = int(32 * sg + lane); i < S * KTOP; i += 32 * NSG) chosen[i] = slots[i];
if (HAS_POINTS) {
  for (uint i = 32 * sg + lane; i < 256; i += 32 * NSG) points[i] = iq2_xxs_point(i);
}
hidden_input<T, I> input = {h, places};
weight_rows<1> rows;
for (int entry = 0; entry <= S * KTOP; entry++) {
  threadgroup_barrier(mem_flags::mem_threadgroup);  // the last entry's places and products are used
  int n = S;
  if (entry == S * KTOP) {
    if (writes) {
      for (int s = 0; s < S; s++) places[s] = s * (KTOP + 1) + KTOP;
    }
    rows.words[0] = (device const uint4*)shared_down;
    rows.size[0] = ulong(D) * row_bytes(FS, I);
    rows.start[0] = ulong(first) * row_bytes(FS, I);
    tile_dot<FS, I, KC, S, ROWS, NSG, 1, T>(rows, n_rows, input, n, xs, (threadgroup uint*)stage,
                                            points, out, sg, lane);
  } else {
    n = share_slot<S, KTOP>(chosen, entry, places, writes);
    if (n == 0) continue;
    rows.words[0] = (device const uint4*)records;
    rows.size[0] = ulong(SLOTS) * RECORD;
    rows.start[0] = ulong(chosen[entry]) * RECORD + DOWN + ulong(first) * row_bytes(FE, I);
    if (S > 1 && n == 1) {
      tile_dot<FE, I, K1, 1, ROWS, NSG, 1, T>(rows, n_rows, input, n, xs, (threadgroup uint*)stage,
                                              points, out, sg, lane);
    } else {
      tile_dot<FE, I, KC, S, ROWS, NSG, 1, T>(rows, n_rows, input, n, xs, (threadgroup uint*)stage,
                                              points, out, sg, lane);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int i = int(32 * sg + lane); i < n * TILE; i += 32 * NSG) {
    if (i % TILE < n_rows) terms[places[i / TILE] * TILE + i % TILE] = out[i];
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
for (int i = int(32 * sg + lane); i < S * TILE; i += 32 * NSG) {
  int s = i / TILE, r = i % TILE;
  if (r >= n_rows) continue;
  float sum = 0.0f;
  for (int j = 0; j <= KTOP; j++) sum += terms[(s * (KTOP + 1) + j) * TILE + r];
  out[i] = sum;
}
threadgroup_barrier(mem_flags::mem_threadgroup);
constexpr int STRIDE = S * (R + 1);
expand_tile<S, H, D, R, TILE, NSG, T>(out, terms, first, n_rows, S, streams, gates, fn, expanded,
                                      partials + first / PART * STRIDE, STRIDE, sg, lane);
