// inputs: ids n_positions
// outputs: order tiles
// Sorts a prompt's (position, choice) pairs by expert, an expert's pairs in their own order, and
// cuts them into tiles of BM pairs of one expert. ids: [positions, KTOP], each below E; pairs with
// a negative one are left out. order: the sorted pairs' numbers, then -1; tiles: (expert, first
// place in order, pairs), unused ones with no pairs.
//
// One threadgroup, a thread for each expert (and E / THREADS more), no atomics: every thread
// counts, then writes, its own expert's pairs, reading the ids from threadgroup memory, all lanes
// the same word: two reads per pair.
#define IDS 2048

// body
threadgroup int block[IDS];
threadgroup int firsts[E + 1];       // of the expert's pairs in order
threadgroup int first_tiles[E + 1];  // of its tiles
int thread_index = int(thread_index_in_threadgroup), n_pairs = n_positions[0] * KTOP;
constexpr int MINE = (E + THREADS - 1) / THREADS;
int counts[MINE];
for (int m = 0; m < MINE; m++) counts[m] = 0;

for (int begin = 0; begin < n_pairs; begin += IDS) {
  int n = min(IDS, n_pairs - begin);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int i = thread_index; i < n; i += THREADS) block[i] = ids[begin + i];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int i = 0; i < n; i++) {
    for (int m = 0; m < MINE; m++) counts[m] += block[i] == thread_index + m * THREADS ? 1 : 0;
  }
}
for (int m = 0; m < MINE; m++) {
  int expert = thread_index + m * THREADS;
  if (expert < E) firsts[expert + 1] = counts[m];
}
threadgroup_barrier(mem_flags::mem_threadgroup);
if (thread_index == 0) {
  firsts[0] = first_tiles[0] = 0;
  for (int e = 0; e < E; e++) {
    first_tiles[e + 1] = first_tiles[e] + (firsts[e + 1] + BM - 1) / BM;
    firsts[e + 1] += firsts[e];
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
int next[MINE];
for (int m = 0; m < MINE; m++) {
  int expert = thread_index + m * THREADS;
  if (expert >= E) continue;
  next[m] = firsts[expert];
  for (int t = first_tiles[expert]; t < first_tiles[expert + 1]; t++) {
    int first = firsts[expert] + (t - first_tiles[expert]) * BM;
    tiles[3 * t] = expert;
    tiles[3 * t + 1] = first;
    tiles[3 * t + 2] = min(BM, firsts[expert + 1] - first);
  }
}
int max_tiles = (n_pairs + BM - 1) / BM + E;
for (int i = 3 * first_tiles[E] + thread_index; i < 3 * max_tiles; i += THREADS) tiles[i] = 0;
for (int i = firsts[E] + thread_index; i < n_pairs; i += THREADS) order[i] = -1;
for (int begin = 0; begin < n_pairs; begin += IDS) {
  int n = min(IDS, n_pairs - begin);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int i = thread_index; i < n; i += THREADS) block[i] = ids[begin + i];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int i = 0; i < n; i++) {
    for (int m = 0; m < MINE; m++) {
      if (block[i] == thread_index + m * THREADS) order[next[m]++] = begin + i;
    }
  }
}
