// A running list of the best (key, id) pairs in threadgroup memory: higher key first, ties to the
// lower id. Key 0 is an empty slot, below every score. Everything here is called by all threads.

constant constexpr uint TOPK_THREADS = 256;

// Floats as unsigned integers of the same order, never 0 for a finite one. -0 would come before 0,
// but a sum that began with 0 is never -0.
inline uint score_key(float score) {
  const uint bits = as_type<uint>(score);
  return (bits & 0x80000000u) ? ~bits : bits | 0x80000000u;
}

inline bool ranks_before(uint key, uint id, uint other_key, uint other_id) {
  return key > other_key || (key == other_key && id < other_id);
}

// Bitonic sort of N pairs, the best first. Every comparison puts the better pair at the lower
// place, so places beyond N, which would hold the worst, can be left out: N need not be a power of
// two.
template <uint N>
inline void sort_pairs(threadgroup uint* keys, threadgroup uint* ids, uint thread_id) {
  for (uint size = 2; size < 2 * N; size *= 2) {
    for (uint stride = size / 2; stride > 0; stride /= 2) {
      for (uint i = thread_id; 2 * i - (i & (stride - 1)) < N; i += TOPK_THREADS) {
        const uint low = 2 * i - (i & (stride - 1));
        const uint high = stride == size / 2 ? low ^ (size - 1) : low + stride;
        if (high < N && ranks_before(keys[high], ids[high], keys[low], ids[low])) {
          const uint key = keys[low];
          const uint id = ids[low];
          keys[low] = keys[high];
          ids[low] = ids[high];
          keys[high] = key;
          ids[high] = id;
        }
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
  }
}

// How full the list is, and what a pair must rank before to be wanted. The same in all threads.
struct TopList {
  uint count;
  uint key;
  uint id;
};

inline TopList empty_list() { return {0, 0, 0xffffffffu}; }

// Leaves the best K pairs, sorted; empty slots after them.
template <uint K, uint N>
inline TopList keep_best(threadgroup uint* keys, threadgroup uint* ids, TopList list,
                         uint thread_id) {
  for (uint i = list.count + thread_id; i < N; i += TOPK_THREADS) {
    keys[i] = 0;
    ids[i] = 0xffffffffu;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  sort_pairs<N>(keys, ids, thread_id);
  return {min(list.count, K), keys[K - 1], ids[K - 1]};
}

// Makes room for one pair of each thread. The list is sorted and cut only when its N slots are
// full, which gets rarer as the K-th key rises: for rows in no order about log(rows / K) times, for
// rows in the worst order every N - K rows.
template <uint K, uint N>
inline TopList make_room(threadgroup uint* keys, threadgroup uint* ids, TopList list,
                         uint thread_id) {
  static_assert(N >= K + TOPK_THREADS, "a cut list has room for one pair of each thread");
  if (list.count + TOPK_THREADS > N) list = keep_best<K, N>(keys, ids, list, thread_id);
  return list;
}

// Takes one pair of each thread, in the order of threads, if it may be among the best K.
inline TopList offer(threadgroup uint* keys, threadgroup uint* ids, threadgroup uint* counts,
                     TopList list, uint key, uint id, uint thread_id) {
  const bool wanted = key != 0 && ranks_before(key, id, list.key, list.id);
  const uint before = simd_prefix_exclusive_sum(wanted ? 1u : 0u);
  if (thread_id % 32 == 31) counts[thread_id / 32] = before + (wanted ? 1u : 0u);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  uint at = list.count + before;
  for (uint i = 0; i < TOPK_THREADS / 32; i++) {
    if (i < thread_id / 32) at += counts[i];
    list.count += counts[i];
  }
  if (wanted) {
    keys[at] = key;
    ids[at] = id;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return list;
}
