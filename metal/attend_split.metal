// inputs: q window_rows delta_rows pooled_rows new_rows ids visible sinks place step
// outputs: partials stats
// Attention of all heads over one shared row per position, first pass: threadgroup (h, i, s) takes
// 8 or 16 heads of query s over the i-th part of its rows. A query's rows are, in this order, the
// W window rows up to itself and its compressed rows, chosen by `ids` (K > 0) or all it may see.
// -> partials [S, splits, NH, HD] (weighted means) and stats [S, splits, NH, 2] (the maximum that
// weights are relative to, the sum of weights).
//
// place: the layer's place in window_rows [layers, W-1, row] (oldest first; the step's own rows
// follow in delta_rows) and in pooled_rows [layers, capacity, row]. step: the first new token's
// position, and how many compressed rows exist before the step's own (new_rows).
// Templates: T, P (of partials), HD, NH, ROPE, W, K, PLAIN (rows are T), SPLITS (most parts of a
// query's rows).
//
// Where the time goes. A row serves every head (584 bytes for 64 x 512 products), so what counts
// is to decode it once and to multiply by simdgroup matrices. Simdgroup g owns channels 64*g to
// 64*g + 63, one FP8 block: it decodes that slice of 16 rows straight into matrix registers, and
// the same registers are the left factor of the scores (rows x q) and the right factor of the
// output (weights x rows), so no row passes through threadgroup memory. A lane's two columns of a
// tile are neighbouring channels, and tile t of a block takes channels 16*part + 2*t (+ 1), part
// being the lane's quarter: 16 neighbouring bytes per lane. q and the sums stay in registers too
// (32 floats each a lane). Only scores cross simdgroups, 9 KB in all.
//
// How a query's rows are split depends on its own number of rows only, so a row of a step does not
// depend on the others in it.
#include "rows.h"
#include "tiles.h"

constant constexpr uint TILE_ROWS = 16;
// Rows per part: few rows are dealt out finely, to have threadgroups at all; of more, a part is as
// large as makes its q and its result (64 KB each for Flash), which is read again, less than its
// rows; of very many, SPLITS parts are enough.
constant constexpr uint FEW_ROWS = 320;
constant constexpr uint MORE_ROWS = 512;

inline uint rows_per_part(uint n_rows, uint most_parts) {
  uint rows = n_rows <= FEW_ROWS ? 32 : n_rows <= MORE_ROWS ? 64 : 128;
  while (rows * most_parts < n_rows) rows *= 2;
  return rows;
}

// Over the 16 lanes that hold one head's rows of a tile.
inline float max_over_rows(float x) {
  for (ushort bit = 1; bit < TILE_ROWS; bit *= 2) x = max(x, simd_shuffle_xor(x, bit));
  return x;
}
inline float sum_over_rows(float x) {
  for (ushort bit = 1; bit < TILE_ROWS; bit *= 2) x += simd_shuffle_xor(x, bit);
  return x;
}

// body
constexpr uint BLOCKS = HD / 64;
constexpr uint HEADS = NH <= 8 ? 8 : 16;
constexpr uint ENTRIES = (HEADS * TILE_ROWS + 32 * BLOCKS - 1) / (32 * BLOCKS);
constexpr uint ROW_BYTES = attention_row_bytes<T, HD, ROPE, PLAIN>();
threadgroup float products[BLOCKS * HEADS * TILE_ROWS];
threadgroup float chances[HEADS * TILE_ROWS];
threadgroup float decays[HEADS];
threadgroup uint seen[TILE_ROWS];

const uint lane = thread_index_in_simdgroup;
const uint block = simdgroup_index_in_threadgroup;
const uint thread_id = thread_position_in_threadgroup.x;
const uint first_head = threadgroup_position_in_grid.x * HEADS;
const uint part = threadgroup_position_in_grid.y;
const uint n_parts = threads_per_grid.y;
const uint query = threadgroup_position_in_grid.z;
const uint tile_r = tile_row(lane);
const uint tile_c = tile_column(lane);
const uint channel = 64 * block + 8 * tile_c;  // the lane's first of 16

const uint n_pooled = K > 0 ? min(uint(visible[query]), uint(K)) : uint(visible[query]);
const uint n_rows = W + n_pooled;
const uint part_rows = rows_per_part(n_rows, SPLITS);
const uint n_old = uint(step[1]);
const int before_window = W - 1 - step[0];  // rows of the window that would precede the sequence
const size_t window_at = size_t(place[0]) * (W - 1);
const size_t pooled_at = size_t(place[1]) * size_t(pooled_rows_shape[1]);
const uint begin = min(part * part_rows, n_rows);
const uint end = min(begin + part_rows, n_rows);

// q^T by tiles [channels, heads]; heads beyond the last are zero.
simdgroup_float8x8 q_tiles[HEADS / 8][8];
MLX_MTL_PRAGMA_UNROLL
for (uint h = 0; h < HEADS / 8; h++) {
  MLX_MTL_PRAGMA_UNROLL
  for (uint t = 0; t < 8; t++) {
    const uint from = 64 * block + 16 * (tile_r / 2) + 2 * t + tile_r % 2;
    MLX_MTL_PRAGMA_UNROLL
    for (uint e = 0; e < 2; e++) {
      const uint head = first_head + 8 * h + tile_c + e;
      q_tiles[h][t].thread_elements()[e] =
          head < NH ? float(q[(size_t(query) * NH + head) * HD + from]) : 0.0f;
    }
  }
}
simdgroup_float8x8 sums[HEADS / 8][8];
MLX_MTL_PRAGMA_UNROLL
for (uint h = 0; h < HEADS / 8; h++) {
  MLX_MTL_PRAGMA_UNROLL
  for (uint t = 0; t < 8; t++) sums[h][t] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
}
// Softmax of entry (head, row) = i * threads + thread_id; the 16 lanes of a head agree on both.
// The sink is one more key, so its logit may start the maximum, which then is never -inf.
float top[ENTRIES];
float total[ENTRIES];
MLX_MTL_PRAGMA_UNROLL
for (uint i = 0; i < ENTRIES; i++) {
  const uint head = first_head + (i * 32 * BLOCKS + thread_id) / TILE_ROWS;
  top[i] = head < NH ? max(sinks[head], -FLT_MAX) : 0.0f;
  total[i] = 0.0f;
}

for (uint tile = begin; tile < end; tile += TILE_ROWS) {
  simdgroup_float8x8 rows[2][8];
  MLX_MTL_PRAGMA_UNROLL
  for (uint half_tile = 0; half_tile < 2; half_tile++) {
    const uint slot = tile + 8 * half_tile + tile_r;
    const device uint8_t* from = (const device uint8_t*)delta_rows;
    bool exists = slot < end;
    if (exists && slot < W) {
      const uint at = query + slot;  // in the state's rows and the step's
      exists = int(at) >= before_window;
      from = at < W - 1 ? (const device uint8_t*)window_rows + (window_at + at) * ROW_BYTES
                        : from + size_t(at - (W - 1)) * ROW_BYTES;
    } else if (exists) {
      const uint id = K > 0 ? uint(ids[size_t(query) * K + slot - W]) : slot - W;
      from = id < n_old ? (const device uint8_t*)pooled_rows + (pooled_at + id) * ROW_BYTES
                        : (const device uint8_t*)new_rows + size_t(id - n_old) * ROW_BYTES;
    }
    float2 x[8];
    // What is not a row of this query may hold anything, also NaN: it is never read.
    MLX_MTL_PRAGMA_UNROLL
    for (uint t = 0; t < 8; t++) x[t] = float2(0.0f);
    if (exists) attention_pairs<HD, ROPE, PLAIN, T>(from, block, tile_c / 2, x);
    MLX_MTL_PRAGMA_UNROLL
    for (uint t = 0; t < 8; t++) {
      rows[half_tile][t].thread_elements()[0] = x[t].x;
      rows[half_tile][t].thread_elements()[1] = x[t].y;
    }
    if (block == 0 && tile_c == 0) seen[8 * half_tile + tile_r] = exists ? 1 : 0;
  }
  MLX_MTL_PRAGMA_UNROLL
  for (uint h = 0; h < HEADS / 8; h++) {
    MLX_MTL_PRAGMA_UNROLL
    for (uint half_tile = 0; half_tile < 2; half_tile++) {
      simdgroup_float8x8 score = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
      MLX_MTL_PRAGMA_UNROLL
      for (uint t = 0; t < 8; t++) {
        simdgroup_multiply_accumulate(score, rows[half_tile][t], q_tiles[h][t], score);
      }
      MLX_MTL_PRAGMA_UNROLL
      for (uint e = 0; e < 2; e++) {
        const uint head = 8 * h + tile_c + e;
        products[(block * HEADS + head) * TILE_ROWS + 8 * half_tile + tile_r] =
            score.thread_elements()[e];
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  MLX_MTL_PRAGMA_UNROLL
  for (uint i = 0; i < ENTRIES; i++) {
    const uint entry = i * 32 * BLOCKS + thread_id;
    if (entry >= HEADS * TILE_ROWS) continue;  // whole simdgroups
    float logit = 0.0f;
    for (uint b = 0; b < BLOCKS; b++) logit += products[b * HEADS * TILE_ROWS + entry];
    logit = seen[entry % TILE_ROWS] ? logit / sqrt(float(HD)) : -INFINITY;
    const float higher = max(top[i], max_over_rows(logit));
    const float chance = exp(logit - higher);
    const float decay = exp(top[i] - higher);
    total[i] = total[i] * decay + sum_over_rows(chance);
    top[i] = higher;
    chances[entry] = chance;
    if (entry % TILE_ROWS == 0) decays[entry / TILE_ROWS] = decay;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  MLX_MTL_PRAGMA_UNROLL
  for (uint h = 0; h < HEADS / 8; h++) {
    const uint head = 8 * h + tile_r;
    MLX_MTL_PRAGMA_UNROLL
    for (uint t = 0; t < 8; t++) {
      sums[h][t].thread_elements()[0] *= decays[head];
      sums[h][t].thread_elements()[1] *= decays[head];
    }
    MLX_MTL_PRAGMA_UNROLL
    for (uint half_tile = 0; half_tile < 2; half_tile++) {
      simdgroup_float8x8 weights;
      MLX_MTL_PRAGMA_UNROLL
      for (uint e = 0; e < 2; e++) {
        weights.thread_elements()[e] = chances[head * TILE_ROWS + 8 * half_tile + tile_c + e];
      }
      MLX_MTL_PRAGMA_UNROLL
      for (uint t = 0; t < 8; t++) {
        simdgroup_multiply_accumulate(sums[h][t], weights, rows[half_tile][t], sums[h][t]);
      }
    }
  }
}

// A mean is no larger than the rows, so that it can be stored in half precision.
threadgroup_barrier(mem_flags::mem_threadgroup);
MLX_MTL_PRAGMA_UNROLL
for (uint i = 0; i < ENTRIES; i++) {
  const uint entry = i * 32 * BLOCKS + thread_id;
  if (entry < HEADS * TILE_ROWS && entry % TILE_ROWS == 0) {
    decays[entry / TILE_ROWS] = total[i] > 0.0f ? 1.0f / total[i] : 0.0f;
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
const size_t out = (size_t(query) * n_parts + part) * NH;
MLX_MTL_PRAGMA_UNROLL
for (uint h = 0; h < HEADS / 8; h++) {
  const uint head = first_head + 8 * h + tile_r;
  if (head >= NH) continue;
  device vec<P, 2>* to = (device vec<P, 2>*)(partials + (out + head) * HD + channel);
  MLX_MTL_PRAGMA_UNROLL
  for (uint t = 0; t < 8; t++) {
    to[t] = vec<P, 2>(P(sums[h][t].thread_elements()[0] * decays[8 * h + tile_r]),
                      P(sums[h][t].thread_elements()[1] * decays[8 * h + tile_r]));
  }
}
MLX_MTL_PRAGMA_UNROLL
for (uint i = 0; i < ENTRIES; i++) {
  const uint entry = i * 32 * BLOCKS + thread_id;
  const uint head = first_head + entry / TILE_ROWS;
  if (entry < HEADS * TILE_ROWS && entry % TILE_ROWS == 0 && head < NH) {
    stats[(out + head) * 2] = top[i];
    stats[(out + head) * 2 + 1] = total[i];
  }
}
