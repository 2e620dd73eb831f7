// What the kernels that choose tokens share.

constant constexpr uint SAMPLE_THREADS = 512;

// A logit after the penalties for tokens that prompt or answer hold, `count` times in the answer.
inline float penalised(float x, bool in_prompt, float count, float repetition, float presence,
                       float frequency) {
  if (in_prompt || count > 0.0f) x = x > 0.0f ? x / repetition : x * repetition;
  return x - (count > 0.0f ? presence : 0.0f) - frequency * count;
}
