// A head's channels over the lanes of one simdgroup: pair i of a lane is channels 64*i + 2*lane
// and the next, so that loads are coalesced and a rotated pair stays in its lane.

template <int N> struct Pairs { float2 at[N]; };

// Through the activation type and back: what the reference stores between two operations.
template <typename T> inline float2 rounded(float2 x) {
  return float2(float(T(x.x)), float(T(x.y)));
}

template <int N> inline Pairs<N> load_pairs(const device float* values, uint lane) {
  Pairs<N> x;
  MLX_MTL_PRAGMA_UNROLL
  for (int i = 0; i < N; i++) x.at[i] = *(const device float2*)(values + 64 * i + 2 * lane);
  return x;
}

template <typename T, int N> inline void store_pairs(device T* values, uint lane, Pairs<N> x) {
  MLX_MTL_PRAGMA_UNROLL
  for (int i = 0; i < N; i++) {
    values[64 * i + 2 * lane] = T(x.at[i].x);
    values[64 * i + 2 * lane + 1] = T(x.at[i].y);
  }
}

template <typename T, int N> inline Pairs<N> rounded_pairs(Pairs<N> x) {
  MLX_MTL_PRAGMA_UNROLL
  for (int i = 0; i < N; i++) x.at[i] = rounded<T>(x.at[i]);
  return x;
}

template <int N> inline float squares(Pairs<N> x) {
  float sum = 0.0f;
  MLX_MTL_PRAGMA_UNROLL
  for (int i = 0; i < N; i++) sum += x.at[i].x * x.at[i].x + x.at[i].y * x.at[i].y;
  return simd_sum(sum);
}

// turn: (cos, sin) of one pair.
inline float2 rotate_pair(float2 x, float2 turn) {
  return float2(x.x * turn.x - x.y * turn.y, x.y * turn.x + x.x * turn.y);
}

// Block `block` of 64 channels of a head of HD, rotated if it is in the last ROPE channels. table:
// (cos, sin) of one position, [ROPE / 2].
template <typename T, int HD, int ROPE>
inline float2 rotate_block(float2 x, const device float* table, uint block, uint lane) {
  if (64 * block < HD - ROPE) return x;
  const uint pair = 32 * (block - (HD - ROPE) / 64) + lane;
  return rounded<T>(rotate_pair(x, *(const device float2*)(table + 2 * pair)));
}

// Sylvester-order Hadamard transform of 64*N channels (a power of two), orthonormal: bit 0 of a
// channel is the place in a pair, bits 1 to 5 the lane, the rest the pair's number.
template <int N> inline Pairs<N> hadamard(Pairs<N> x, uint lane) {
  MLX_MTL_PRAGMA_UNROLL
  for (int i = 0; i < N; i++) x.at[i] = float2(x.at[i].x + x.at[i].y, x.at[i].x - x.at[i].y);
  MLX_MTL_PRAGMA_UNROLL
  for (ushort bit = 1; bit < 32; bit *= 2) {
    MLX_MTL_PRAGMA_UNROLL
    for (int i = 0; i < N; i++) {
      const float2 other = float2(simd_shuffle_xor(x.at[i].x, bit),
                                  simd_shuffle_xor(x.at[i].y, bit));
      x.at[i] = (lane & bit) ? other - x.at[i] : x.at[i] + other;
    }
  }
  MLX_MTL_PRAGMA_UNROLL
  for (int bit = 1; bit < N; bit *= 2) {
    MLX_MTL_PRAGMA_UNROLL
    for (int i = 0; i < N; i++) {
      if (i & bit) continue;
      const float2 low = x.at[i];
      x.at[i] = low + x.at[i | bit];
      x.at[i | bit] = low - x.at[i | bit];
    }
  }
  const float scale = 1.0f / sqrt(float(64 * N));
  MLX_MTL_PRAGMA_UNROLL
  for (int i = 0; i < N; i++) x.at[i] = x.at[i] * scale;
  return x;
}
