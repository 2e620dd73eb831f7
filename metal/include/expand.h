// What follows every sublayer, for the channels of one tile: its output goes into the residual
// streams, and the next hyper-connection's products with the new streams are begun, so that nobody
// has to read them again for it. Its partial sums are per tile; the reader adds them in order.

// y, mixed: [S, TILE] and [S, H, TILE] of threadgroup memory; channel `first` + r stands at r, the
// first n_rows exist, as do the first n_s rows of S. gates: post | comb, [S, H + H * H], where
// comb[j, k] carries stream j into stream k. streams, expanded: [S, H, D]; fn: [R, H * D].
// partials [P, S, R + 1] of tile `group`: products with fn's rows, then the sum of squares; P * S *
// (R + 1) elements before it belong to other tiles. All threads take part; y must be complete.
template <int S, int H, int D, int R, int TILE, int NSG, typename T>
inline void expand_tile(threadgroup const float* y, threadgroup float* mixed, int first, int n_rows,
                        int n_s, device const T* streams, device const float* gates,
                        device const float* fn, device T* expanded, device float* partials,
                        uint sg, uint lane) {
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
  // A simdgroup reads some rows of fn, 128 bytes at a time, once for all n_s rows of streams.
  for (int row = int(sg); row <= R; row += NSG) {
    float sums[S];
    for (int s = 0; s < S; s++) sums[s] = 0.0f;
    for (int h = 0; h < H; h++) {
      for (int r = int(lane); r < n_rows; r += 32) {
        float factor = row < R ? fn[(row * H + h) * D + first + r] : 0.0f;
        MLX_MTL_PRAGMA_UNROLL
        for (int s = 0; s < S; s++) {
          if (s >= n_s) break;
          float value = mixed[(s * H + h) * TILE + r];
          sums[s] = fma(row < R ? factor : value, value, sums[s]);
        }
      }
    }
    MLX_MTL_PRAGMA_UNROLL
    for (int s = 0; s < S; s++) {
      float sum = simd_sum(sums[s]);
      if (lane == 0 && s < n_s) partials[s * (R + 1) + row] = sum;
    }
  }
}
