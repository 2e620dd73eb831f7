// Counter-based noise: a hash of (key, counter) instead of a generator's state, so any thread can
// draw any number, and the same draw can be made elsewhere (ds4py/kernels/sample.py).
#include "elementary.h"

// Two rounds of xor-shift and multiplication with odd constants found by search for low bias
// (Wellons, "hash prospector", public domain).
inline uint mix_bits(uint x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ (x >> 16);
}

constant constexpr float UNIT = 1.0f / 4294967296.0f;

// Standard Gumbel. The uniform number keeps its relative precision near 0, which is where the
// large values, those that win, come from.
inline float gumbel(uint high, uint low, uint counter) {
  const uint bits = mix_bits(mix_bits(counter + high) ^ low);
  const float uniform = min((float(bits) + 0.5f) * UNIT, 1.0f - 256.0f * UNIT);
  return -log(-log_one_plus(-uniform));
}
