// inputs: projected history index_history ape index_ape turn norm index_norm place step constants
// outputs: rows index_rows
// The compressed rows that the new tokens complete: pooled, normed, rotated, packed. Threadgroup
// (0, j): attention row j of the step; (1, j), where the layer has an indexer: its index row.
// Columns of `projected` as in heads_prepare; it and the score bias are read again here, so that
// this kernel need not wait for that one. place[1] is the layer's place in the stacked histories
// [layers, C*RATIO - 1, width] (the tokens just before the step, score bias included, scores -inf
// before the sequence); step is the first new token's position and the rows that exist before
// it; constants[0] the norm's epsilon. Templates: T, HD, ROPE, LATENT, RATIO, C (2: a row pools
// the window before it too), INDEX_DIM (0: no indexer), TRAIL (columns after the values), PLAIN.
//
// A lane holds one pair of channels and walks over the tokens with a running softmax, so a token's
// row of values is read once, in whole lines. A ratio-128 row is 512 KB; it comes once in 128
// tokens.
#include "rows.h"
#include "heads.h"

// Where the values and scores of a series lie: [value | score], C*D channels each.
struct Series {
  const device float* fresh;    // of the step's first token; rows of `stride` floats
  const device float* past;     // of the oldest token kept
  const device float* bias;     // [RATIO, 2*C*D]
  uint stride;
  int start;                    // the first new token's position
};

// Row `number`, channels `channel` and the next: one softmax per channel over its window's tokens
// and, with overlap, the other half of the channels over the window before it.
template <int D, int RATIO, int C> inline float2 pool_pair(Series s, int number, uint channel) {
  constexpr uint width = 2 * C * D;
  constexpr int kept = C * RATIO - 1;
  float2 top = float2(-INFINITY);
  float2 total = float2(0.0f);
  float2 sum = float2(0.0f);
  for (int window = 0; window < C; window++) {  // its own first, so that `top` is finite from then
    const uint value_at = (C - 1 - window) * D + channel;
    for (int i = 0; i < RATIO; i++) {
      const int token = RATIO * (number - window) + i;
      float2 value;
      float2 score;
      if (token >= s.start) {
        const device float* from = s.fresh + size_t(token - s.start) * s.stride + value_at;
        const device float* bias = s.bias + i * width + value_at;
        value = *(const device float2*)from + *(const device float2*)bias;
        score = *(const device float2*)(from + C * D) + *(const device float2*)(bias + C * D);
      } else {
        const device float* from = s.past + size_t(token - s.start + kept) * width + value_at;
        value = *(const device float2*)from;
        score = *(const device float2*)(from + C * D);
      }
      const float2 higher = max(top, score);
      const float2 keep = exp(top - higher);
      const float2 weight = exp(score - higher);
      total = total * keep + weight;
      sum = sum * keep + weight * value;
      top = higher;
    }
  }
  return sum / total;
}

// body
constexpr uint INDEX_WIDTH = INDEX_DIM > 0 ? INDEX_DIM : 64;  // unused without an indexer
constexpr uint ROW_BYTES = attention_row_bytes<T, HD, ROPE, PLAIN>();
constexpr uint INDEX_ROW_BYTES = index_row_bytes<T, INDEX_WIDTH, PLAIN>();
constexpr uint VALUES = 2 * C * HD;
constexpr uint INDEX_VALUES = 2 * C * INDEX_DIM;
constexpr int KEPT = C * RATIO - 1;
threadgroup float square_sums[HD / 64];

const uint lane = thread_index_in_simdgroup;
const uint block = simdgroup_index_in_threadgroup;
const uint fresh_row = threadgroup_position_in_grid.z;
const int number = step[1] + int(fresh_row);
const device float* table = turn + size_t(fresh_row) * ROPE;
const uint stride = LATENT + HD + VALUES + INDEX_VALUES + TRAIL;

if (threadgroup_position_in_grid.y == 0) {
  const Series s = {projected + LATENT + HD, history + size_t(place[1]) * KEPT * VALUES, ape,
                    stride, step[0]};
  float2 x = rounded<T>(pool_pair<HD, RATIO, C>(s, number, 64 * block + 2 * lane));
  const float mine = simd_sum(x.x * x.x + x.y * x.y);
  if (lane == 0) square_sums[block] = mine;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float sum = 0.0f;
  for (uint i = 0; i < HD / 64; i++) sum += square_sums[i];
  const float root = sqrt(sum / float(HD) + constants[0]);
  const float2 weight = *(const device float2*)(norm + 64 * block + 2 * lane);
  x = rotate_block<T, HD, ROPE>(rounded<T>(x / root * weight), table, block, lane);
  attention_block_store<T, HD, ROPE, PLAIN>(
      (device uint8_t*)rows + size_t(fresh_row) * ROW_BYTES, block, lane, x);
  if (INDEX_DIM == 0 && fresh_row == 0 && block == 0 && lane == 0) index_rows[0] = 0;
} else if (block == 0) {  // 128 channels at ratio 4 are work for one simdgroup
  const Series s = {projected + LATENT + HD + VALUES,
                    index_history + size_t(place[1]) * KEPT * INDEX_VALUES, index_ape, stride,
                    step[0]};
  Pairs<INDEX_WIDTH / 64> x;
  MLX_MTL_PRAGMA_UNROLL
  for (uint i = 0; i < INDEX_WIDTH / 64; i++) {
    x.at[i] = rounded<T>(pool_pair<INDEX_WIDTH, RATIO, C>(s, number, 64 * i + 2 * lane));
  }
  const float root = sqrt(squares(x) / float(INDEX_WIDTH) + constants[0]);
  const Pairs<INDEX_WIDTH / 64> weight = load_pairs<INDEX_WIDTH / 64>(index_norm, lane);
  MLX_MTL_PRAGMA_UNROLL
  for (uint i = 0; i < INDEX_WIDTH / 64; i++) {
    const float2 y = rounded<T>(x.at[i] / root * weight.at[i]);
    x.at[i] = rotate_block<T, INDEX_WIDTH, ROPE>(y, table, i, lane);
  }
  device uint8_t* out = (device uint8_t*)index_rows + size_t(fresh_row) * INDEX_ROW_BYTES;
  if (PLAIN) {
    store_pairs((device T*)out, lane, x);
  } else {
    x = rounded_pairs<T>(hadamard(x, lane));
    MLX_MTL_PRAGMA_UNROLL
    for (uint i = 0; i < INDEX_WIDTH / 64; i++) {
      fp4_pair_store(out, INDEX_WIDTH, i, lane, x.at[i]);
    }
  }
}
