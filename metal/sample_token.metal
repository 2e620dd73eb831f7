// inputs: logits in_prompt counts bias lowest noise_key settings
// outputs: token
// The next token of every row [S, V], one threadgroup per row: penalties, bias, temperature, then
// the highest, or the highest of logit + Gumbel noise among those not below the limit. Ties to the
// lower id. settings [S, 5]: temperature, log(min_p) or -inf, repetition, presence and frequency
// penalty. lowest [S]: the smallest scaled logit that may be drawn, -inf where none is excluded;
// noise_key [S, 2]. Templates: V, PENALISED (else in_prompt and counts are not read), BIASED,
// GREEDY.
//
// Half a megabyte is read twice, the second time from cache: 20 us against the 20 ms of a token, so
// one launch is better than a split and its second pass.
#include "noise.h"
#include "sampling.h"

struct Best {
  float value;
  uint id;
};

inline Best better(Best a, float value, uint id) {
  if (value > a.value || (value == a.value && id < a.id)) return {value, id};
  return a;
}

// Over the threadgroup; the result is in all threads.
inline Best best_of_all(Best mine, threadgroup float* values, threadgroup uint* ids, uint lane,
                        uint group) {
  const float value = simd_max(mine.value);
  const uint id = simd_min(mine.value == value ? mine.id : 0xffffffffu);
  if (lane == 0) {
    values[group] = value;
    ids[group] = id;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  Best best = {-INFINITY, 0xffffffffu};
  for (uint i = 0; i < SAMPLE_THREADS / 32; i++) best = better(best, values[i], ids[i]);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  return best;
}

// body
threadgroup float values[SAMPLE_THREADS / 32];
threadgroup uint ids[SAMPLE_THREADS / 32];

const uint thread_id = thread_position_in_threadgroup.x;
const uint lane = thread_index_in_simdgroup;
const uint group = simdgroup_index_in_threadgroup;
const uint row = threadgroup_position_in_grid.y;
const size_t base = size_t(row) * V;
const float temperature = GREEDY ? 1.0f : settings[row * 5];
float limit = -INFINITY;
Best best = {-INFINITY, 0xffffffffu};
for (uint pass = GREEDY ? 1 : 0; pass < 2; pass++) {
  best = {-INFINITY, 0xffffffffu};
  for (uint id = thread_id; id < V; id += SAMPLE_THREADS) {
    float x = logits[base + id];
    if (PENALISED) {
      x = penalised(x, in_prompt[base + id], counts[base + id], settings[row * 5 + 2],
                    settings[row * 5 + 3], settings[row * 5 + 4]);
    }
    if (BIASED) x += bias[base + id];
    x = x / temperature;
    if (!GREEDY && pass == 1) {
      if (x < limit) continue;
      x += gumbel(noise_key[row * 2], noise_key[row * 2 + 1], id);
    }
    best = better(best, x, id);
  }
  best = best_of_all(best, values, ids, lane, group);
  if (!GREEDY) limit = max(lowest[row], best.value + settings[row * 5 + 1]);
}
if (thread_id == 0) token[row] = int(min(best.id, uint(V - 1)));
