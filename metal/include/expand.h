// What follows every sublayer, for the channels of one tile: its output goes into the residual
// streams, and the next hyper-connection's products with the new streams are begun, so that nobody
// has to read them again for it. Its partial sums are of 32 channels, whatever the tile is; the
// reader adds them in order.

enum { PART = 32 };

// y, mixed: [S, TILE] and [S, H, TILE] of threadgroup memory; channel `first` + r stands at r, the
// first n_rows exist, as do the first n_s rows of S. gates: post | comb, [S, H + H * H], where
// comb[j, k] carries stream j into stream k. streams, expanded: [S, H, D]; fn: [R, H * D]. TILE is
// whole parts. partials: of the tile's first part, [S, R + 1]: products with fn's rows, then
// the sum of squares; the next part's come `stride` later. All threads take part; y must be
// complete.
template <int S, int H, int D, int R, int TILE, int NSG, typename T, typename F>
inline void expand_tile(threadgroup const float* y, threadgroup float* mixed, int first, int n_rows,
                        int n_s, device const T* streams, device const float* gates,
                        device const F* fn, device T* expanded, device float* partials,
                        ulong stride, uint sg, uint lane) {
  constexpr int G = H + H * H;
  for (int i = int(32 * sg + lane); i < n_s * TILE; i += 32 * NSG) {
    int s = i / TILE, r = i % TILE;
    if (r >= n_rows) continue;
    ulong at = ulong(s) * H * D + first + r;
    float old[H];
    for (int j = 0; j < H; j++) old[j] = float(streams[at + j * D]);
    for (int k = 0; k < H; k++) {
      float sum = gates[s * G + k] * y[i];
      for (int j = 0; j < H; j++) sum = fma(gates[s * G + H + j * H + k], old[j], sum);
      T rounded = T(sum);
      expanded[at + k * D] = rounded;
      mixed[(s * H + k) * TILE + r] = float(rounded);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  // A simdgroup reads some rows of fn, once for all n_s rows of streams, two parts at a time: 16
  // lanes for a part, two channels each.
  constexpr int PAIRS = (TILE + 63) / 64;
  for (int i = int(sg); i < PAIRS * (R + 1); i += NSG) {
    int row = i / PAIRS, r = i % PAIRS * 64 + 2 * int(lane), part = r / PART;
    float sums[S];
    for (int s = 0; s < S; s++) sums[s] = 0.0f;
    for (int h = 0; h < H; h++) {
      if (r >= min(n_rows, TILE)) break;
      vec<F, 2> stored = vec<F, 2>(F(0.0f), F(0.0f));
      if (row < R) stored = *(device const vec<F, 2>*)(fn + (row * H + h) * D + first + r);
      float2 factor = float2(float(stored.x), float(stored.y));
      MLX_MTL_PRAGMA_UNROLL
      for (int s = 0; s < S; s++) {
        if (s >= n_s) break;
        float a = mixed[(s * H + h) * TILE + r], b = mixed[(s * H + h) * TILE + r + 1];
        sums[s] = fma(row < R ? factor.x : a, a, sums[s]);
        sums[s] = fma(row < R ? factor.y : b, b, sums[s]);
      }
    }
    MLX_MTL_PRAGMA_UNROLL
    for (int s = 0; s < S; s++) {
      for (ushort bit = 1; bit < 16; bit *= 2) sums[s] += simd_shuffle_xor(sums[s], bit);
      if (lane % 16 == 0 && s < n_s && r < min(n_rows, TILE)) {
        partials[part * stride + s * (R + 1) + row] = sums[s];
      }
    }
  }
}
