// inputs: streams partials fn_base fn_scale norm_weight epsilons
// outputs: collapsed gates
// A hyper-connection before a sublayer, one threadgroup per row: finish the mix's products, then
// sigmoid and Sinkhorn, the weighted sum of the streams, and the sublayer's norm. Templates: T, H,
// D, P (parts of the products), ITERS (Sinkhorn; 0: the head's form, whose gates are the weights).
//
// The work is 100 KB of loads at most, so it is latency that counts: sums over P are taken by
// columns (32 lanes side by side read one part's 25 numbers), every simdgroup computes the H*H
// matrix by itself, one entry per lane, instead of waiting for one that does, and the collapsed
// row stays in registers between the two passes of the norm.

#include "elementary.h"

constant constexpr uint HYPER_THREADS = 256;
constant constexpr uint HYPER_SIMDGROUPS = HYPER_THREADS / 32;

// Sum over the lanes whose number differs in `count` neighbouring bits from `first` on.
inline float sum_over(float x, ushort first, ushort count) {
  for (ushort i = 0; i < count; i++) x += simd_shuffle_xor(x, ushort(first << i));
  return x;
}

// Lane j*H + k (modulo H*H) holds entry [j, k].
template <int LOG_H, int ITERS> inline float sinkhorn(float logit, float eps) {
  constexpr ushort column = 1 << LOG_H;
  float top = logit;
  for (ushort bit = 1; bit < column; bit *= 2) top = max(top, simd_shuffle_xor(top, bit));
  float c = exp(logit - top);
  c = c / sum_over(c, 1, LOG_H) + eps;
  c = c / (sum_over(c, column, LOG_H) + eps);
  for (int i = 1; i < ITERS; i++) {
    c = c / (sum_over(c, 1, LOG_H) + eps);
    c = c / (sum_over(c, column, LOG_H) + eps);
  }
  return c;
}

// body
constexpr uint R = ITERS > 0 ? 2 * H + H * H : H;
constexpr uint N_GATES = ITERS > 0 ? H + H * H : H;
constexpr int LOG_H = H == 4 ? 2 : (H == 2 ? 1 : 0);
constexpr uint FOURS = (D / 4 + HYPER_THREADS - 1) / HYPER_THREADS;
threadgroup float column_sums[HYPER_SIMDGROUPS * (R + 1)];
threadgroup float square_sums[HYPER_SIMDGROUPS];

const uint row = threadgroup_position_in_grid.y;
const uint n_rows = threads_per_grid.y;
const uint thread_id = thread_position_in_threadgroup.x;
const uint lane = thread_index_in_simdgroup;
const uint group = simdgroup_index_in_threadgroup;

for (uint column = lane; column < R + 1; column += 32) {
  float sum = 0.0f;
  for (uint part = group; part < P; part += HYPER_SIMDGROUPS) {
    sum += partials[(size_t(part) * n_rows + row) * (R + 1) + column];
  }
  column_sums[group * (R + 1) + column] = sum;
}
threadgroup_barrier(mem_flags::mem_threadgroup);

float squares = 0.0f;
for (uint g = 0; g < HYPER_SIMDGROUPS; g++) squares += column_sums[g * (R + 1) + R];
const float rms = sqrt(squares / float(H * D) + epsilons[0]);

// Lane i of every simdgroup: product i and, with Sinkhorn, product 2H + i.
float first = 0.0f;
float second = 0.0f;
const uint entry = ITERS > 0 ? 2 * H + lane % (H * H) : 0;
for (uint g = 0; g < HYPER_SIMDGROUPS; g++) {
  first += column_sums[g * (R + 1) + lane % R];
  second += column_sums[g * (R + 1) + entry];
}
const float gate = sigmoid(first / rms * fn_scale[lane % R] + fn_base[lane % R]);
float weights[H];
MLX_MTL_PRAGMA_UNROLL
for (ushort h = 0; h < H; h++) weights[h] = simd_shuffle(gate, h) + epsilons[1];
if (ITERS > 0) {
  const float comb = sinkhorn<LOG_H, ITERS>(
      second / rms * fn_scale[entry] + fn_base[entry], epsilons[1]);
  if (group == 0 && lane >= H && lane < 2 * H) gates[row * N_GATES + lane - H] = 2.0f * gate;
  if (group == 0 && lane < H * H) gates[row * N_GATES + H + lane] = comb;
} else if (group == 0 && lane < H) {
  gates[row * N_GATES + lane] = gate + epsilons[1];
}

float4 sum_of_streams[FOURS];
float mine = 0.0f;
MLX_MTL_PRAGMA_UNROLL
for (uint i = 0; i < FOURS; i++) {
  const uint four = i * HYPER_THREADS + thread_id;
  if (four >= D / 4) continue;
  float4 x = float4(0.0f);
  MLX_MTL_PRAGMA_UNROLL
  for (uint h = 0; h < H; h++) {
    const size_t from = (size_t(row) * H + h) * (D / 4) + four;
    x += weights[h] * float4(((const device vec<T, 4>*)streams)[from]);
  }
  x = float4(vec<T, 4>(x));  // the reference stores it in T before the norm
  sum_of_streams[i] = x;
  mine += dot(x, x);
}
mine = simd_sum(mine);
if (lane == 0) square_sums[group] = mine;
threadgroup_barrier(mem_flags::mem_threadgroup);
float total = 0.0f;
for (uint g = 0; g < HYPER_SIMDGROUPS; g++) total += square_sums[g];
const float root = sqrt(total / float(D) + epsilons[2]);
MLX_MTL_PRAGMA_UNROLL
for (uint i = 0; i < FOURS; i++) {
  const uint four = i * HYPER_THREADS + thread_id;
  if (four >= D / 4) continue;
  const float4 y = sum_of_streams[i] / root * ((const device float4*)norm_weight)[four];
  ((device vec<T, 4>*)collapsed)[size_t(row) * (D / 4) + four] = vec<T, 4>(y);
}
