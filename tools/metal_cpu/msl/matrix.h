// simdgroup_matrix<T, 8, 8>: two neighbouring elements of one row per lane.
//
// Which lane holds which element follows the layout that MLX's own kernels rely on, so that code
// that goes through thread_elements() finds the same elements here.
#pragma once
#include "simd.h"

namespace metal {
template <class T, int R = 8, int C = 8> struct simdgroup_matrix {
  static_assert(R == 8 && C == 8, "simdgroup_matrix: only 8x8 exists");
  vec<T, 2> e;
  simdgroup_matrix() = default;
  MSL_AI explicit simdgroup_matrix(T diagonal) {
    for (uint i = 0; i < 2; i++) e.d[i] = row() == col() + i ? diagonal : T(0);
  }
  MSL_AI thread vec<T, 2>& thread_elements() { return (thread vec<T, 2>&)e; }
  static MSL_AI uint row() { uint l = msl_lane(), q = l / 4; return (q & 4) + (l / 2) % 4; }
  static MSL_AI uint col() { uint l = msl_lane(), q = l / 4; return (q & 2) * 2 + (l % 2) * 2; }
};
typedef simdgroup_matrix<float> simdgroup_float8x8;
typedef simdgroup_matrix<half> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat> simdgroup_bfloat8x8;

template <class T, int R = 8, int C = 8>
MSL_AI simdgroup_matrix<T, R, C> make_filled_simdgroup_matrix(T v) {
  simdgroup_matrix<T, R, C> m;
  m.e = vec<T, 2>(v);
  return m;
}

// Loads and stores exchange nothing: lanes meet there only to be checked for divergence.
#ifdef MSL_CHECK
#define MSL_MEET(name) msl_show(0u, line_, name)
#else
#define MSL_MEET(name)
#endif

#define MSL_MATRIX_MEMORY(space)                                                                \
  template <class T>                                                                            \
  MSL_AI void simdgroup_load(thread simdgroup_matrix<T>& m, const space T* p, ulong stride = 8, \
                             ulong2 origin = ulong2(0), bool transpose = false, MSL_AT) {       \
    MSL_MEET("simdgroup_load");                                                                 \
    for (uint i = 0; i < 2; i++) {                                                              \
      ulong r = m.row(), c = m.col() + i;                                                       \
      m.e.d[i] = p[(origin.y + (transpose ? c : r)) * stride + origin.x + (transpose ? r : c)]; \
    }                                                                                           \
  }                                                                                             \
  template <class T>                                                                            \
  MSL_AI void simdgroup_store(thread const simdgroup_matrix<T>& m, space T* p,                  \
                              ulong stride = 8, ulong2 origin = ulong2(0),                      \
                              bool transpose = false, MSL_AT) {                                 \
    MSL_MEET("simdgroup_store");                                                                \
    for (uint i = 0; i < 2; i++) {                                                              \
      ulong r = m.row(), c = m.col() + i;                                                       \
      p[(origin.y + (transpose ? c : r)) * stride + origin.x + (transpose ? r : c)] = m.e.d[i]; \
    }                                                                                           \
  }
MSL_MATRIX_MEMORY(device)
MSL_MATRIX_MEMORY(threadgroup)

// d = a b + c, accumulated in float in ascending k and rounded once to d's type. The last lane to
// arrive computes the whole product.
template <class D, class A, class B, class C>
MSL_AI void simdgroup_multiply_accumulate(thread simdgroup_matrix<D>& d, thread simdgroup_matrix<A>& a,
                                          thread simdgroup_matrix<B>& b, thread simdgroup_matrix<C>& c,
                                          MSL_AT) {
  device msl_state* s = msl_worker();
  uint p = s->parity, at = d.row() * 8 + d.col();
  for (uint i = 0; i < 2; i++) {
    s->mat[p][0][at + i] = (float)a.e.d[i];
    s->mat[p][1][at + i] = (float)b.e.d[i];
    s->mat[p][2][at + i] = (float)c.e.d[i];
  }
  if (msl_arrive(MSL_SIMD_OP, line_, "simdgroup_multiply_accumulate")) {
    if (s->n_lanes != 32) msl_fail(line_, "a simdgroup_matrix needs all 32 lanes");
    msl_multiply(s->mat[p][0]);
    msl_next();
  }
  for (uint i = 0; i < 2; i++) d.e.d[i] = (D)s->mat[p][3][at + i];
}
template <class D, class A, class B>
MSL_AI void simdgroup_multiply(thread simdgroup_matrix<D>& d, thread simdgroup_matrix<A>& a,
                               thread simdgroup_matrix<B>& b, MSL_AT) {
  simdgroup_matrix<D> zero = make_filled_simdgroup_matrix<D, 8, 8>(D(0));
  simdgroup_multiply_accumulate(d, a, b, zero, line_);
}
} // namespace metal
