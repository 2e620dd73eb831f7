// inputs: logits in_prompt counts bias bounds settings
// outputs: scaled lowest
// Before a draw among the likeliest: every row's logits [S, V] after penalties, bias and
// temperature, and the smallest of them within top-k and, of what that leaves, top-p; one
// threadgroup per row. Ties at a boundary stay together. bounds [S, 2]: k, or 0 for all; p.
// settings as in sample_token. Templates: V, PENALISED (else in_prompt and counts are not read),
// BIASED.
//
// No sort: the smallest is found two bits of its key at a time, from the highest, by counting, or
// weighing, what lies above three candidates. Sixteen readings of half a megabyte, by each thread
// of what it wrote itself; sums are in a fixed order.
#include "sampling.h"
#include "topk.h"

constant constexpr uint SUMS = 4;

inline float key_score(uint key) {
  return as_type<float>((key & 0x80000000u) ? key ^ 0x80000000u : ~key);
}

// body
threadgroup float parts[SUMS * SAMPLE_THREADS / 32];

const uint thread_id = thread_position_in_threadgroup.x;
const uint lane = thread_index_in_simdgroup;
const uint group = simdgroup_index_in_threadgroup;
const uint row = threadgroup_position_in_grid.y;
const size_t base = size_t(row) * V;

float highest = -INFINITY;
for (uint id = thread_id; id < V; id += SAMPLE_THREADS) {
  float x = logits[base + id];
  if (PENALISED) {
    x = penalised(x, in_prompt[base + id], counts[base + id], settings[row * 5 + 2],
                  settings[row * 5 + 3], settings[row * 5 + 4]);
  }
  if (BIASED) x += bias[base + id];
  x = x / settings[row * 5];
  scaled[base + id] = x;
  highest = max(highest, x);
}
highest = simd_max(highest);
if (lane == 0) parts[group] = highest;
threadgroup_barrier(mem_flags::mem_threadgroup);
for (uint i = 0; i < SAMPLE_THREADS / 32; i++) highest = max(highest, parts[i]);
threadgroup_barrier(mem_flags::mem_threadgroup);

uint least = 0;  // its key
for (uint round = 0; round < 2; round++) {
  const bool weigh = round == 1;
  if (weigh ? bounds[row * 2 + 1] >= 1.0f : bounds[row * 2] <= 0.0f) continue;
  uint found = 0;  // the largest key with enough at and above it, as far as its bits are known
  for (int shift = 30; shift >= 0; shift -= 2) {
    float sums[SUMS] = {0.0f, 0.0f, 0.0f, 0.0f};  // of all, and at and above each candidate
    for (uint id = thread_id; id < V; id += SAMPLE_THREADS) {
      const float x = scaled[base + id];
      const uint key = score_key(x);
      if (key < least) continue;
      const float weight = weigh ? exp(x - highest) : 1.0f;
      sums[0] += weight;
      MLX_MTL_PRAGMA_UNROLL
      for (uint i = 1; i < SUMS; i++) sums[i] += key >= found + (i << shift) ? weight : 0.0f;
    }
    MLX_MTL_PRAGMA_UNROLL
    for (uint i = 0; i < SUMS; i++) {
      const float sum = simd_sum(sums[i]);
      if (lane == 0) parts[SUMS * group + i] = sum;
      sums[i] = 0.0f;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint j = 0; j < SAMPLE_THREADS / 32; j++) {
      for (uint i = 0; i < SUMS; i++) sums[i] += parts[SUMS * j + i];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const float enough = weigh ? bounds[row * 2 + 1] * sums[0] : min(bounds[row * 2], float(V));
    uint best = 0;
    for (uint i = 1; i < SUMS; i++) best = sums[i] >= enough ? i : best;
    found += best << shift;
  }
  least = found;
}
if (thread_id == 0) lowest[row] = least == 0 ? -INFINITY : key_score(least);
