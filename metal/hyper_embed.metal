// inputs: tokens table reader
// outputs: streams partials
// A step's first streams and their products with the first hyper-connection's fn: threadgroup
// (p, i) writes channels 64*p to 64*p + 63 of rows 8*i to 8*i + 7, once per stream, and their part
// of the products [P, S, R + 1], the last being the sum of squares. The table is rows of bytes of
// format F. Templates: T, H, D, R, F.
//
// Streams are equal here, so a channel's H weights are added up before the product. fn (1.5 MB for
// Flash) is the traffic: a simdgroup takes every eighth row of it, in whole lines, for 8 tokens.
#include "formats.h"

constant constexpr uint EMBED_CHANNELS = 64;
constant constexpr uint EMBED_ROWS = 8;
constant constexpr uint EMBED_SIMDGROUPS = 8;
constant constexpr uint OCTETS = EMBED_CHANNELS / 8;

// body
const uint lane = thread_index_in_simdgroup;
const uint group = simdgroup_index_in_threadgroup;
const uint thread_id = thread_position_in_threadgroup.x;
const uint part = threadgroup_position_in_grid.x;
const uint first_row = threadgroup_position_in_grid.y * EMBED_ROWS;
const uint n_tokens = uint(tokens_shape[0]);
const uint n_rows = min(EMBED_ROWS, n_tokens - first_row);
threadgroup float values[EMBED_ROWS * EMBED_CHANNELS];

threadgroup uint2 points[F == FORMAT_IQ2_XXS ? 256 : 1];
if (F == FORMAT_IQ2_XXS) {
  points[thread_id] = iq2_xxs_point(int(thread_id));
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

for (uint i = thread_id; i < EMBED_ROWS * OCTETS; i += 32 * EMBED_SIMDGROUPS) {
  const uint channel = part * EMBED_CHANNELS + 8 * (i % OCTETS);
  const bool present = i / OCTETS < n_rows && channel < D;
  const uint row = first_row + (present ? i / OCTETS : 0);
  octet o = {float4(0.0f), float4(0.0f), 0.0f, 0.0f};
  if (present) {
    const size_t begin = size_t(tokens[row]) * row_bytes(F, D);
    const uint unit = row_bytes(F, int(channel / 256 * 256));
    o = octet_at<F>((device const uint*)table + (begin >> 2), uint(begin & 3) + unit,
                    channel % 256 / 8, points);
  }
  MLX_MTL_PRAGMA_UNROLL
  for (uint j = 0; j < 8; j++) {
    const T value = T((j < 4 ? o.lo[j] : o.hi[j - 4]) * o.scale - o.least);
    values[8 * i + j] = float(value);
    if (!present) continue;
    for (uint h = 0; h < H; h++) streams[(size_t(row) * H + h) * D + channel + j] = value;
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
for (uint r = group; r < R + 1; r += EMBED_SIMDGROUPS) {
  float2 weights = float2(float(H));
  for (uint e = 0; e < 2; e++) {
    const uint channel = part * EMBED_CHANNELS + 32 * e + lane;
    if (r == R || channel >= D) continue;
    float sum = 0.0f;
    for (uint h = 0; h < H; h++) sum += float(reader[(size_t(r) * H + h) * D + channel]);
    weights[e] = sum;
  }
  for (uint row = 0; row < n_rows; row++) {
    const float2 x = float2(values[row * EMBED_CHANNELS + lane],
                            values[row * EMBED_CHANNELS + 32 + lane]);
    const float2 terms = r == R ? x * x * weights : x * weights;
    const float sum = simd_sum(terms.x + terms.y);
    if (lane == 0) partials[(size_t(part) * n_tokens + first_row + row) * (R + 1) + r] = sum;
  }
}
