// inputs: index_query index_weights index_rows new_index_rows visible place step
// outputs: candidate_keys candidate_ids
// The indexer, first pass: threadgroup (i, s) scores its part of the rows query s may see,
// sum_h relu(q_h . row) * weight_h, and keeps the best K: keys (score_key) and row numbers, rank r
// of part i at [s, r, i] of [S, K, parts]; key 0 where there are fewer. Parts take turns in rounds
// of 256 rows, so that rows near each other, which are often chosen together, are in several.
//
// index_query: [S, HEADS, row], packed as rows are. place[1]: the layer's place in index_rows
// [layers, capacity, row]; step[1]: how many rows exist before the step's own, new_index_rows.
// Templates: T, D, HEADS, K, N (slots of the list), PLAIN.
//
// Work: 64 heads x 128 channels = 8,192 products for 68 bytes, so this is arithmetic, not memory;
// a query's heads are the large operand (16 KB decoded), and sharing a row's bytes between queries
// would save nothing. A tile of 8 rows is decoded straight into eight-by-eight matrices: lanes hold
// pairs of channels (one byte), and the channels are dealt out so that a lane's bytes are
// neighbours (D/8 of them) under one FP4 scale. One matrix of q is loaded for four of rows. Scores
// go no further than 1 KB of threadgroup memory; nothing grows with the context.
#include "rows.h"
#include "tiles.h"
#include "topk.h"

constant constexpr uint ROW_TILES = 4;  // of 8 rows, per simdgroup
constant constexpr uint SCORED = ROW_TILES * 8 * TOPK_THREADS / 32;  // rows per round

// What holds values of rows and queries without loss: rounded ones are exact in bfloat16 whatever
// the activations are, which halves the registers that rows take.
template <bool PLAIN, typename T> struct Held { typedef bfloat16_t type; };
template <typename T> struct Held<true, T> { typedef T type; };

// Channels part*D/4 + 2*t (+ 1), t below D/8, of one row.
template <int D, bool PLAIN, typename T, typename Q>
inline void index_pairs(const device uint8_t* row, uint part, thread vec<Q, 2>* x) {
  if (PLAIN) {
    const device T* values = (const device T*)row + part * (D / 4);
    MLX_MTL_PRAGMA_UNROLL
    for (uint t = 0; t < D / 8; t++) x[t] = vec<Q, 2>(Q(values[2 * t]), Q(values[2 * t + 1]));
    return;
  }
  const device uint* words = (const device uint*)(row + part * (D / 8));
  float scale = 0.0f;
  MLX_MTL_PRAGMA_UNROLL
  for (uint w = 0; w < D / 32; w++) {
    const uint word = words[w];
    if (w % (FP4_BLOCK / 8) == 0) {
      scale = e8m0_decode(row[D / 2 + (part * (D / 4) + 8 * w) / FP4_BLOCK]);
    }
    MLX_MTL_PRAGMA_UNROLL
    for (uint b = 0; b < 4; b++) {
      const uint codes = word >> (8 * b);
      x[4 * w + b] = vec<Q, 2>(Q(e2m1_decode(codes) * scale), Q(e2m1_decode(codes >> 4) * scale));
    }
  }
}

// body
constexpr uint STEPS = D / 8;
constexpr uint HEAD_TILES = (HEADS + 7) / 8;
constexpr uint ROW_BYTES = index_row_bytes<T, D, PLAIN>();
typedef typename Held<PLAIN, T>::type Q;
threadgroup Q q_tiles[HEAD_TILES * STEPS * 64];
threadgroup float head_weights[HEAD_TILES * 8];
threadgroup float scores[SCORED];
threadgroup uint keys[N];
threadgroup uint ids[N];
threadgroup uint counts[TOPK_THREADS / 32];

const uint lane = thread_index_in_simdgroup;
const uint group = simdgroup_index_in_threadgroup;
const uint thread_id = thread_position_in_threadgroup.x;
const uint part = threadgroup_position_in_grid.x;
const uint n_parts = threadgroups_per_grid.x;
const uint query = threadgroup_position_in_grid.y;
const uint tile_r = tile_row(lane);
const uint tile_c = tile_column(lane);

// q^T by tiles [channels, heads], as the lanes will read them; channel k of step t is
// k/2 * D/4 + 2*t + k%2, as in index_pairs. Heads beyond the last have weight 0.
for (uint i = thread_id; i < HEAD_TILES * 8 * 4; i += TOPK_THREADS) {
  const uint head = i / 4;
  vec<Q, 2> x[STEPS];
  MLX_MTL_PRAGMA_UNROLL
  for (uint t = 0; t < STEPS; t++) x[t] = vec<Q, 2>(Q(0.0f), Q(0.0f));
  if (head < HEADS) {
    const device uint8_t* from =
        (const device uint8_t*)index_query + (size_t(query) * HEADS + head) * ROW_BYTES;
    index_pairs<D, PLAIN, T, Q>(from, i % 4, x);
  }
  MLX_MTL_PRAGMA_UNROLL
  for (uint t = 0; t < STEPS; t++) {
    const uint at = (head / 8 * STEPS + t) * 64 + 2 * (i % 4) * 8 + head % 8;
    q_tiles[at] = x[t].x;
    q_tiles[at + 8] = x[t].y;
  }
}
for (uint head = thread_id; head < HEAD_TILES * 8; head += TOPK_THREADS) {
  head_weights[head] = head < HEADS ? index_weights[size_t(query) * HEADS + head] : 0.0f;
}
threadgroup_barrier(mem_flags::mem_threadgroup);

const uint n_rows = uint(visible[query]);
const uint n_old = uint(step[1]);
const size_t layer_at = size_t(place[1]) * size_t(index_rows_shape[1]);
TopList list = empty_list();
for (uint first = part * SCORED; first < n_rows; first += n_parts * SCORED) {
  vec<Q, 2> rows[ROW_TILES][STEPS];
  MLX_MTL_PRAGMA_UNROLL
  for (uint i = 0; i < ROW_TILES; i++) {
    const uint id = min(first + (group * ROW_TILES + i) * 8 + tile_r, n_rows - 1);
    const device uint8_t* from = id < n_old
        ? (const device uint8_t*)index_rows + (layer_at + id) * ROW_BYTES
        : (const device uint8_t*)new_index_rows + size_t(id - n_old) * ROW_BYTES;
    index_pairs<D, PLAIN, T, Q>(from, tile_c / 2, rows[i]);
  }
  float sums[ROW_TILES] = {};
  for (uint h = 0; h < HEAD_TILES; h++) {
    simdgroup_float8x8 dots[ROW_TILES];
    MLX_MTL_PRAGMA_UNROLL
    for (uint i = 0; i < ROW_TILES; i++) {
      dots[i] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    }
    MLX_MTL_PRAGMA_UNROLL
    for (uint t = 0; t < STEPS; t++) {
      simdgroup_float8x8 q;
      const uint at = (h * STEPS + t) * 64 + tile_r * 8 + tile_c;
      q.thread_elements()[0] = float(q_tiles[at]);
      q.thread_elements()[1] = float(q_tiles[at + 1]);
      MLX_MTL_PRAGMA_UNROLL
      for (uint i = 0; i < ROW_TILES; i++) {
        simdgroup_float8x8 row;
        row.thread_elements()[0] = float(rows[i][t].x);
        row.thread_elements()[1] = float(rows[i][t].y);
        simdgroup_multiply_accumulate(dots[i], row, q, dots[i]);
      }
    }
    MLX_MTL_PRAGMA_UNROLL
    for (uint i = 0; i < ROW_TILES; i++) {
      sums[i] += max(dots[i].thread_elements()[0], 0.0f) * head_weights[8 * h + tile_c];
      sums[i] += max(dots[i].thread_elements()[1], 0.0f) * head_weights[8 * h + tile_c + 1];
    }
  }
  MLX_MTL_PRAGMA_UNROLL
  for (uint i = 0; i < ROW_TILES; i++) {  // the four lanes of a row differ in bits 0 and 3
    sums[i] += simd_shuffle_xor(sums[i], ushort(1));
    sums[i] += simd_shuffle_xor(sums[i], ushort(8));
    if (tile_c == 0) scores[(group * ROW_TILES + i) * 8 + tile_r] = sums[i];
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const uint id = first + thread_id;
  const uint key = id < n_rows ? score_key(scores[thread_id]) : 0;
  list = make_room<K, N>(keys, ids, list, thread_id);
  list = offer(keys, ids, counts, list, key, id, thread_id);
}
keep_best<K, N>(keys, ids, list, thread_id);
for (uint i = thread_id; i < K; i += TOPK_THREADS) {
  const size_t to = (size_t(query) * K + i) * n_parts + part;
  candidate_keys[to] = keys[i];
  candidate_ids[to] = ids[i];
}
