// inputs: candidate_keys candidate_ids
// outputs: selected
// The indexer, second pass, one threadgroup per query: of the parts' candidates [S, K, parts] the
// best K, ties to the lower row, in ascending order; empty slots last and 0. Templates: K, N.
//
// The parts' lists come best first and are read rank by rank. So the lowest kept key rises at once,
// and when a round, which holds at least one candidate of each part, has none that is wanted, no
// later one is: about 2 * K of the K * parts candidates are read.
#include "topk.h"

// body
threadgroup uint keys[N];
threadgroup uint ids[N];
threadgroup uint counts[TOPK_THREADS / 32];

const uint thread_id = thread_position_in_threadgroup.x;
const uint query = threadgroup_position_in_grid.y;
const uint n_candidates = K * uint(candidate_keys_shape[2]);
const size_t from = size_t(query) * n_candidates;

TopList list = empty_list();
for (uint first = 0; first < n_candidates; first += TOPK_THREADS) {
  const uint i = first + thread_id;
  const uint key = i < n_candidates ? candidate_keys[from + i] : 0;
  const uint id = i < n_candidates ? candidate_ids[from + i] : 0;
  list = make_room<K, N>(keys, ids, list, thread_id);
  const uint before = list.count;
  list = offer(keys, ids, counts, list, key, id, thread_id);
  if (list.count == before) break;
}
list = keep_best<K, N>(keys, ids, list, thread_id);
threadgroup_barrier(mem_flags::mem_threadgroup);
// Ascending row numbers are descending complements; empty slots have key 0 and stay last.
for (uint i = thread_id; i < N; i += TOPK_THREADS) keys[i] = i < list.count ? ~ids[i] : 0;
threadgroup_barrier(mem_flags::mem_threadgroup);
sort_pairs<N>(keys, ids, thread_id);
for (uint i = thread_id; i < K; i += TOPK_THREADS) {
  selected[size_t(query) * K + i] = i < list.count ? int(ids[i]) : 0;
}
