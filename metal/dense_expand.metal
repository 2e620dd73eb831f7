// inputs: x w streams gates fn
// outputs: expanded partials
// The matrix that ends a sublayer, its output added to the residual streams (expand.h).
#include "matvec.h"
#include "expand.h"

template <typename TX, int K> struct sublayer_output {
  device const TX* values;
  float4 four(int s, int k) const {
    vec<TX, 4> v = *(device const vec<TX, 4>*)(values + s * K + k);
    return float4(float(v.x), float(v.y), float(v.z), float(v.w));
  }
};

// body
constexpr int TILE = NSG * ROWS;
threadgroup vec<T, 4> xs[S * KC / 4];
threadgroup uint4 stage[NSG * stage_words(S) / 4];
threadgroup uint2 points[F == FORMAT_IQ2_XXS ? 256 : 1];
threadgroup float out[S * TILE];
uint sg = simdgroup_index_in_threadgroup, lane = thread_index_in_simdgroup;
int group = int(threadgroup_position_in_grid.x);
int first = group * TILE, n_rows = smaller(TILE, D - first);

if (F == FORMAT_IQ2_XXS) {
  for (uint i = 32 * sg + lane; i < 256; i += 32 * NSG) points[i] = iq2_xxs_point(i);
}
weight_rows<1> rows;
rows.words[0] = (device const uint4*)w;
rows.size[0] = ulong(D) * row_bytes(F, K);
rows.start[0] = ulong(first) * row_bytes(F, K);
sublayer_output<TX, K> input = {x};
tile_dot<F, K, KC, S, ROWS, NSG, 1, T>(rows, n_rows, input, S, xs, (threadgroup uint*)stage, points,
                                       out, sg, lane);
threadgroup_barrier(mem_flags::mem_threadgroup);
// The new streams lie where weights were staged, of which a simdgroup's had more room.
static_assert(S * H * ROWS <= stage_words(S), "");
threadgroup float* mixed = (threadgroup float*)stage;
constexpr int STRIDE = S * (R + 1);
expand_tile<S, H, D, R, TILE, NSG, T>(out, mixed, first, n_rows, S, streams, gates, fn, expanded,
                                      partials + first / PART * STRIDE, STRIDE, sg, lane);
