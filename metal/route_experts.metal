// inputs: logits bias_or_table tokens scaling
// outputs: expert_ids expert_weights
// The router, one simdgroup per row: sqrt(softplus(logits)); the K experts with the highest score +
// bias, ties to the lower id, or those of the token's table row (HASHED); ids ascending, and their
// unbiased scores over their sum, times scaling[0]. Templates: E, K, HASHED (bias_or_table is int32
// [vocabulary, K], else float32 [E]).
//
// A lane holds E/32 scores in registers; each of the K rounds is two simdgroup reductions.
#include "elementary.h"

// body
constexpr uint PER_LANE = (E + 31) / 32;
const uint lane = thread_index_in_simdgroup;
const uint row = threadgroup_position_in_grid.y;

float ranks[PER_LANE];
if (!HASHED) {
  MLX_MTL_PRAGMA_UNROLL
  for (uint i = 0; i < PER_LANE; i++) {
    const uint expert = 32 * i + lane;
    ranks[i] = expert < E ? sqrt(softplus(logits[size_t(row) * E + expert])) +
                                float(bias_or_table[expert]) : -INFINITY;
  }
}
uint mine = E;  // lane i holds the i-th chosen, then the i-th lowest
for (uint round = 0; round < K; round++) {
  uint chosen;
  if (HASHED) {
    chosen = uint(bias_or_table[size_t(tokens[row]) * K + round]);
  } else {
    float best = -INFINITY;
    MLX_MTL_PRAGMA_UNROLL
    for (uint i = 0; i < PER_LANE; i++) best = max(best, ranks[i]);
    best = simd_max(best);
    chosen = E;
    MLX_MTL_PRAGMA_UNROLL
    for (uint i = 0; i < PER_LANE; i++) {
      if (ranks[i] == best) chosen = min(chosen, 32 * i + lane);
    }
    chosen = simd_min(chosen);
    MLX_MTL_PRAGMA_UNROLL
    for (uint i = 0; i < PER_LANE; i++) {
      if (32 * i + lane == chosen) ranks[i] = -INFINITY;
    }
  }
  if (lane == round) mine = chosen;
}
uint place = 0;
for (ushort i = 0; i < K; i++) {
  const uint other = simd_shuffle(mine, i);
  if (other < mine || (other == mine && i < lane)) place++;
}
const float score = lane < K ? sqrt(softplus(logits[size_t(row) * E + mine])) : 0.0f;
const float total = simd_sum(score);
if (lane < K) {
  expert_ids[row * K + place] = int(mine);
  expert_weights[row * K + place] = score / total * scaling[0];
}
