// inputs: terms streams gates fn n_positions
// outputs: expanded partials
// The end of a sublayer for any number of rows: terms [positions, TERMS, D], summed in order, go
// into the residual streams (expand.h). Eight positions share the reading of fn.
#include "expand.h"

// body
threadgroup float y[8 * TILE];
threadgroup float mixed[8 * H * TILE];
uint sg = simdgroup_index_in_threadgroup, lane = thread_index_in_simdgroup;
int group = int(threadgroup_position_in_grid.x);
int first = group * TILE, n_rows = min(TILE, D - first);
int position = 8 * int(threadgroup_position_in_grid.y), n_s = min(8, n_positions[0] - position);

for (int i = int(32 * sg + lane); i < n_s * TILE; i += 32 * NSG) {
  int s = i / TILE, r = i % TILE;
  if (r >= n_rows) continue;
  device const float* term = terms + ulong(position + s) * TERMS * D + first + r;
  float sum = 0.0f;
  for (int j = 0; j < TERMS; j++) sum += term[j * D];
  y[i] = sum;
}
threadgroup_barrier(mem_flags::mem_threadgroup);
ulong before = ulong(position) * H * D, stride = ulong(n_positions[0]) * (R + 1);
expand_tile<8, H, D, R, TILE, NSG, T>(
    y, mixed, first, n_rows, n_s, streams + before, gates + position * (H + H * H), fn,
    expanded + before, partials + group * stride + position * (R + 1), stride, sg, lane);
