// inputs: projected queries turn kv_norm ape index_ape step constants
// outputs: q row values index_values index_query index_weights
// From a layer's projections to what its attention reads, one job per simdgroup and new token: a
// query head; the token's own row, packed; 128 of the compressors' values, with their score bias;
// an index head; the index weights. No job waits for another, so there is neither threadgroup
// memory nor a barrier. An output the layer does not have is one zero.
//
// Columns: projected is wq_a | wkv | the compressor's values and scores | the indexer's | index
// weights, each as present; queries is the heads | the index heads. step[0] is the first new
// token's position, constants the norm's epsilon and the index weights' factor. Templates: T, HD,
// NH (0: no queries), ROPE, LATENT (width of wq_a), RATIO (0: no compressor), VALUES, INDEX_VALUES
// (their widths), INDEX_DIM, INDEX_HEADS (0: no indexer), PLAIN (rows and index queries stay T,
// unrounded; else index queries are packed as index rows are: every part of the indexer's search
// reads them).
#include "rows.h"
#include "heads.h"

constant constexpr uint VALUES_PER_JOB = 128;

template <typename T, int HD, int ROPE>
inline void query_head(const device float* in, device T* out, const device float* table, float eps,
                       uint lane) {
  Pairs<HD / 64> x = rounded_pairs<T>(load_pairs<HD / 64>(in, lane));
  const float root = sqrt(squares(x) / float(HD) + eps);
  MLX_MTL_PRAGMA_UNROLL
  for (uint i = 0; i < HD / 64; i++) {
    x.at[i] = rotate_block<T, HD, ROPE>(rounded<T>(x.at[i] / root), table, i, lane);
  }
  store_pairs(out, lane, x);
}

template <typename T, int HD, int ROPE, bool PLAIN>
inline void own_row(const device float* in, device uint8_t* out, const device float* table,
                    const device float* norm, float eps, uint lane) {
  Pairs<HD / 64> x = rounded_pairs<T>(load_pairs<HD / 64>(in, lane));
  const Pairs<HD / 64> weight = load_pairs<HD / 64>(norm, lane);
  const float root = sqrt(squares(x) / float(HD) + eps);
  MLX_MTL_PRAGMA_UNROLL
  for (uint i = 0; i < HD / 64; i++) {
    const float2 y = rounded<T>(x.at[i] / root * weight.at[i]);
    attention_block_store<T, HD, ROPE, PLAIN>(
        out, i, lane, rotate_block<T, HD, ROPE>(y, table, i, lane));
  }
}

template <typename T, int D, int ROPE, bool PLAIN>
inline void index_head(const device float* in, device uint8_t* out, const device float* table,
                       uint lane) {
  Pairs<D / 64> x = rounded_pairs<T>(load_pairs<D / 64>(in, lane));
  MLX_MTL_PRAGMA_UNROLL
  for (uint i = 0; i < D / 64; i++) x.at[i] = rotate_block<T, D, ROPE>(x.at[i], table, i, lane);
  if (PLAIN) {  // without rounding the transform cancels between query and row
    store_pairs((device T*)out, lane, x);
    return;
  }
  x = rounded_pairs<T>(hadamard(x, lane));
  MLX_MTL_PRAGMA_UNROLL
  for (uint i = 0; i < D / 64; i++) fp4_pair_store(out, D, i, lane, x.at[i]);
}

// body
constexpr uint VALUES_AT = LATENT + HD;
constexpr uint INDEX_VALUES_AT = VALUES_AT + VALUES;
constexpr uint WEIGHTS_AT = INDEX_VALUES_AT + INDEX_VALUES;
constexpr uint ROW_JOB = NH;
constexpr uint VALUE_JOBS = ROW_JOB + 1;
constexpr uint N_VALUE_JOBS = (VALUES + INDEX_VALUES + VALUES_PER_JOB - 1) / VALUES_PER_JOB;
constexpr uint INDEX_JOBS = VALUE_JOBS + N_VALUE_JOBS;
constexpr uint INDEX_WIDTH = INDEX_DIM > 0 ? INDEX_DIM : 64;  // unused without an indexer
constexpr uint ROW_BYTES = attention_row_bytes<T, HD, ROPE, PLAIN>();
constexpr uint INDEX_ROW_BYTES = index_row_bytes<T, INDEX_WIDTH, PLAIN>();

const uint job = thread_position_in_grid.x / 32;
const uint lane = thread_index_in_simdgroup;
const uint token = thread_position_in_grid.y;
const device float* columns = projected + size_t(token) * (WEIGHTS_AT + INDEX_HEADS);
const device float* heads = queries + size_t(token) * (NH * HD + INDEX_HEADS * INDEX_DIM);
const device float* table = turn + size_t(token) * ROPE;
const float eps = constants[0];

if (job < ROW_JOB) {
  query_head<T, HD, ROPE>(
      heads + job * HD, q + (size_t(token) * NH + job) * HD, table, eps, lane);
} else if (job == ROW_JOB) {
  own_row<T, HD, ROPE, PLAIN>(
      columns + LATENT, (device uint8_t*)row + size_t(token) * ROW_BYTES, table, kv_norm, eps,
      lane);
} else if (job < INDEX_JOBS) {
  const uint phase = RATIO > 0 ? uint(step[0] + int(token)) % (RATIO > 0 ? RATIO : 1) : 0;
  for (uint i = lane; i < VALUES_PER_JOB; i += 32) {
    const uint column = (job - VALUE_JOBS) * VALUES_PER_JOB + i;
    if (column < VALUES) {
      values[size_t(token) * VALUES + column] =
          columns[VALUES_AT + column] + ape[phase * VALUES + column];
    } else if (column < VALUES + INDEX_VALUES) {
      const uint index_column = column - VALUES;
      index_values[size_t(token) * INDEX_VALUES + index_column] =
          columns[VALUES_AT + column] + index_ape[phase * INDEX_VALUES + index_column];
    }
  }
} else if (job < INDEX_JOBS + INDEX_HEADS) {
  const uint head = job - INDEX_JOBS;
  index_head<T, INDEX_WIDTH, ROPE, PLAIN>(
      heads + NH * HD + head * INDEX_DIM,
      (device uint8_t*)index_query + (size_t(token) * INDEX_HEADS + head) * INDEX_ROW_BYTES, table,
      lane);
} else {
  for (uint head = lane; head < INDEX_HEADS; head += 32) {
    index_weights[size_t(token) * INDEX_HEADS + head] =
        float(T(columns[WEIGHTS_AT + head])) * constants[1];
  }
}
if (job == 0 && token == 0 && lane == 0) {
  if (NH == 0) q[0] = T(0.0f);
  if (VALUES == 0) values[0] = 0.0f;
  if (INDEX_VALUES == 0) index_values[0] = 0.0f;
  if (INDEX_HEADS == 0) {
    index_query[0] = 0;
    index_weights[0] = 0.0f;
  }
}
