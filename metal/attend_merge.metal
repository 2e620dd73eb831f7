// inputs: partials stats sinks turn
// outputs: attended
// Attention, second pass: threadgroup (., h, s) adds up head h of query s over the parts, with the
// sink in the denominator, and rotates the result back. Templates: T, P (of partials), HD, NH,
// ROPE.
//
// A lane holds a pair of channels, so the loads of a part are one line per 32 lanes and the
// rotation needs no exchange. Every simdgroup computes the parts' weights by itself, one part per
// lane: there are at most 32.
#include "heads.h"

// body
const uint lane = thread_index_in_simdgroup;
const uint block = simdgroup_index_in_threadgroup;
const uint head = threadgroup_position_in_grid.y;
const uint query = threadgroup_position_in_grid.z;
const uint n_parts = stats_shape[1];

const size_t first = size_t(query) * n_parts * NH + head;  // part i is i * NH further
const float sink = max(sinks[head], -FLT_MAX);
float top = sink;
float weight = 0.0f;
if (lane < n_parts) {
  top = stats[(first + lane * NH) * 2];
  weight = stats[(first + lane * NH) * 2 + 1];
}
const float highest = simd_max(top);  // no part's is below the sink's
const float decay = lane < n_parts ? exp(top - highest) : 0.0f;
const float share = weight * decay;
const float total = simd_sum(share) + exp(sink - highest);

const uint channel = 64 * block + 2 * lane;
float2 sum = float2(0.0f);
for (uint i = 0; i < n_parts; i++) {
  const size_t from = (first + size_t(i) * NH) * HD + channel;
  const vec<P, 2> mean = *(const device vec<P, 2>*)(partials + from);
  sum += simd_shuffle(share, ushort(i)) * float2(float(mean.x), float(mean.y));
}
const float2 x = rounded<T>(sum / total);
// The inverse rotation is the rotation by the negative sine.
float2 y = x;
if (64 * block >= HD - ROPE) {
  const uint pair = 32 * (block - (HD - ROPE) / 64) + lane;
  const device float* table = turn + size_t(query) * ROPE + 2 * pair;
  y = rotate_pair(x, float2(table[0], -table[1]));
}
device T* to = attended + (size_t(query) * NH + head) * HD + channel;
to[0] = T(y.x);
to[1] = T(y.y);
