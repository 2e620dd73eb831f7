// Elementary functions that Metal lacks.

inline float sigmoid(float x) { return 1.0f / (1.0f + exp(-x)); }

// log(1 + x) without cancellation, x > -1.
inline float log_one_plus(float x) {
  const float one = 1.0f + x;
  return one == 1.0f ? x : log(one) * (x / (one - 1.0f));
}

inline float softplus(float x) { return max(x, 0.0f) + log_one_plus(exp(-fabs(x))); }
