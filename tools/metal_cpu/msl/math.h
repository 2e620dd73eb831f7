// The mathematical, integer and relational functions, for scalars and component by component.
//
// half and bfloat functions compute in float and round once. Results follow the host's libm, not
// Apple's: equal to a few ULP.
#pragma once
#include "vec.h"

#define MSL_F1(name, expr)                                                              \
  MSL_AI float name(float x) { return expr; }                                           \
  MSL_AI half name(half x_) { float x = x_; return (half)(expr); }                      \
  MSL_AI bfloat name(bfloat x_) { float x = x_; return (bfloat)(expr); }                \
  template <class A, class V = vec_of<A>> MSL_AI V name(A a) {                          \
    V r = a;                                                                            \
    for (int i = 0; i < vec_traits<V>::n; i++) r.d[i] = name(r.d[i]);                   \
    return r;                                                                           \
  }
#define MSL_V2(name)                                                                    \
  template <class A, class B, class V = vec_both<A, B>> MSL_AI V name(A a, B b) {       \
    V r = a, s = b;                                                                     \
    for (int i = 0; i < vec_traits<V>::n; i++) r.d[i] = name(r.d[i], s.d[i]);           \
    return r;                                                                           \
  }
#define MSL_V3(name)                                                                    \
  template <class A, class B, class C, class V = vec_both<vec_both<A, B>, C>>           \
  MSL_AI V name(A a, B b, C c) {                                                        \
    V r = a, s = b, t = c;                                                              \
    for (int i = 0; i < vec_traits<V>::n; i++) r.d[i] = name(r.d[i], s.d[i], t.d[i]);   \
    return r;                                                                           \
  }
#define MSL_F2(name, expr)                                                              \
  MSL_AI float name(float x, float y) { return expr; }                                  \
  MSL_AI half name(half x_, half y_) { float x = x_, y = y_; return (half)(expr); }     \
  MSL_AI bfloat name(bfloat x_, bfloat y_) { float x = x_, y = y_; return (bfloat)(expr); } \
  MSL_V2(name)
#define MSL_F3(name, expr)                                                              \
  MSL_AI float name(float x, float y, float z) { return expr; }                         \
  MSL_AI half name(half x_, half y_, half z_) {                                         \
    float x = x_, y = y_, z = z_;                                                       \
    return (half)(expr);                                                                \
  }                                                                                     \
  MSL_AI bfloat name(bfloat x_, bfloat y_, bfloat z_) {                                 \
    float x = x_, y = y_, z = z_;                                                       \
    return (bfloat)(expr);                                                              \
  }                                                                                     \
  MSL_V3(name)

#define MSL_FLOAT_FUNCTIONS                                     \
  MSL_F1(exp, __builtin_expf(x))                                \
  MSL_F1(exp2, __builtin_exp2f(x))                              \
  MSL_F1(exp10, __builtin_powf(10.0f, x))                       \
  MSL_F1(log, __builtin_logf(x))                                \
  MSL_F1(log2, __builtin_log2f(x))                              \
  MSL_F1(log10, __builtin_log10f(x))                            \
  MSL_F1(sqrt, __builtin_sqrtf(x))                              \
  MSL_F1(rsqrt, 1.0f / __builtin_sqrtf(x))                      \
  MSL_F1(sin, __builtin_sinf(x))                                \
  MSL_F1(cos, __builtin_cosf(x))                                \
  MSL_F1(tan, __builtin_tanf(x))                                \
  MSL_F1(asin, __builtin_asinf(x))                              \
  MSL_F1(acos, __builtin_acosf(x))                              \
  MSL_F1(atan, __builtin_atanf(x))                              \
  MSL_F1(sinh, __builtin_sinhf(x))                              \
  MSL_F1(cosh, __builtin_coshf(x))                              \
  MSL_F1(tanh, __builtin_tanhf(x))                              \
  MSL_F1(asinh, __builtin_asinhf(x))                            \
  MSL_F1(acosh, __builtin_acoshf(x))                            \
  MSL_F1(atanh, __builtin_atanhf(x))                            \
  MSL_F1(sinpi, __builtin_sinf(x * M_PI_F))                     \
  MSL_F1(cospi, __builtin_cosf(x * M_PI_F))                     \
  MSL_F1(ceil, __builtin_ceilf(x))                              \
  MSL_F1(floor, __builtin_floorf(x))                            \
  MSL_F1(trunc, __builtin_truncf(x))                            \
  MSL_F1(rint, __builtin_rintf(x))                              \
  MSL_F1(round, __builtin_roundf(x))                            \
  MSL_F1(fract, __builtin_fminf(x - __builtin_floorf(x), 0x1.fffffep-1f)) \
  MSL_F1(fabs, __builtin_fabsf(x))                              \
  MSL_F1(sign, x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : x == 0.0f ? x : 0.0f) \
  MSL_F1(saturate, __builtin_fminf(__builtin_fmaxf(x, 0.0f), 1.0f)) \
  MSL_F2(pow, __builtin_powf(x, y))                             \
  MSL_F2(powr, __builtin_powf(x, y))                            \
  MSL_F2(fmod, __builtin_fmodf(x, y))                           \
  MSL_F2(atan2, __builtin_atan2f(x, y))                         \
  MSL_F2(copysign, __builtin_copysignf(x, y))                   \
  MSL_F2(divide, x / y)                                         \
  MSL_F2(fdim, __builtin_fdimf(x, y))                           \
  MSL_F2(fmin, __builtin_fminf(x, y))                           \
  MSL_F2(fmax, __builtin_fmaxf(x, y))

namespace metal {
namespace precise {
MSL_FLOAT_FUNCTIONS
}
namespace fast {
MSL_FLOAT_FUNCTIONS
}
MSL_FLOAT_FUNCTIONS
MSL_F1(log1p, __builtin_log1pf(x)) // Metal has none; MLX's preamble adds it
MSL_F1(expm1, __builtin_expm1f(x)) // likewise
MSL_F1(erf, __builtin_erff(x))     // likewise
MSL_F2(step, y < x ? 0.0f : 1.0f)
MSL_F3(fma, __builtin_fmaf(x, y, z))
MSL_F3(mix, x + (y - x) * z)

MSL_AI float ldexp(float x, int e) { return __builtin_ldexpf(x, e); }
MSL_AI half ldexp(half x, int e) { return (half)__builtin_ldexpf((float)x, e); }
MSL_AI float frexp(float x, thread int& e) {
  int k;
  float m = __builtin_frexpf(x, &k);
  e = k;
  return m;
}
MSL_AI int ilogb(float x) { return __builtin_ilogbf(x); }

#define MSL_TESTS(T)                                                         \
  MSL_AI bool isnan(T x) { return __builtin_isnan((float)x); }               \
  MSL_AI bool isinf(T x) { return __builtin_isinf((float)x); }               \
  MSL_AI bool isfinite(T x) { return __builtin_isfinite((float)x); }         \
  MSL_AI bool isnormal(T x) { return __builtin_isnormal((float)x); }         \
  MSL_AI bool signbit(T x) { return __builtin_signbit((float)x); }
MSL_TESTS(float)
MSL_TESTS(half)
MSL_TESTS(bfloat)
#define MSL_TEST_V(name)                                                     \
  template <class A, class V = vec_of<A>> MSL_AI vec<bool, vec_traits<V>::n> name(A a) { \
    V v = a;                                                                 \
    vec<bool, vec_traits<V>::n> r;                                           \
    for (int i = 0; i < vec_traits<V>::n; i++) r.d[i] = name(v.d[i]);        \
    return r;                                                                \
  }
MSL_TEST_V(isnan)
MSL_TEST_V(isinf)
MSL_TEST_V(isfinite)
template <int N> MSL_AI bool any(vec<bool, N> v) {
  bool r = false;
  for (int i = 0; i < N; i++) r |= v.d[i];
  return r;
}
template <int N> MSL_AI bool all(vec<bool, N> v) {
  bool r = true;
  for (int i = 0; i < N; i++) r &= v.d[i];
  return r;
}

// min, max, clamp, abs: overloads, not templates, so that mixed types are ambiguous as in Metal.
#define MSL_ORDER(T)                                                         \
  MSL_AI T min(T x, T y) { return y < x ? y : x; }                           \
  MSL_AI T max(T x, T y) { return x < y ? y : x; }                           \
  MSL_AI T clamp(T x, T lo, T hi) { return min(max(x, lo), hi); }            \
  MSL_AI T select(T a, T b, bool c) { return c ? b : a; }
#define MSL_FLOAT_ORDER(T)                                                   \
  MSL_AI T min(T x, T y) { return (T)__builtin_fminf((float)x, (float)y); }  \
  MSL_AI T max(T x, T y) { return (T)__builtin_fmaxf((float)x, (float)y); }  \
  MSL_AI T clamp(T x, T lo, T hi) { return min(max(x, lo), hi); }            \
  MSL_AI T abs(T x) { return (T)__builtin_fabsf((float)x); }                 \
  MSL_AI T select(T a, T b, bool c) { return c ? b : a; }
#define MSL_INTEGER(T, U)                                                    \
  MSL_ORDER(T)                                                               \
  MSL_AI T abs(T x) { return (T)(x < (T)0 ? (U)0 - (U)x : (U)x); }           \
  MSL_AI U absdiff(T x, T y) { return x < y ? (U)y - (U)x : (U)x - (U)y; }   \
  MSL_AI T popcount(T x) { return (T)__builtin_popcountl((ulong)(U)x); }     \
  MSL_AI T clz(T x) {                                                        \
    return (T)(x ? __builtin_clzl((ulong)(U)x) - 64 + 8 * (int)sizeof(T) : 8 * (int)sizeof(T)); \
  }                                                                          \
  MSL_AI T ctz(T x) { return (T)(x ? __builtin_ctzl((ulong)(U)x) : 8 * (int)sizeof(T)); } \
  MSL_AI T reverse_bits(T x) {                                               \
    return (T)(__builtin_bitreverse64((ulong)(U)x) >> (64 - 8 * sizeof(T))); \
  }                                                                          \
  MSL_AI T rotate(T x, T n_) {                                               \
    uint n = (uint)n_ & (8 * sizeof(T) - 1);                                 \
    return n ? (T)(((U)x << n) | ((U)x >> (8 * sizeof(T) - n))) : x;         \
  }                                                                          \
  MSL_AI T extract_bits(T x, uint offset, uint bits) {                       \
    if (bits == 0) return (T)0;                                              \
    uint up = 8 * sizeof(T) - bits;                                          \
    return (T)((T)((U)x << (up - offset)) >> up);                            \
  }                                                                          \
  MSL_AI T insert_bits(T base, T insert, uint offset, uint bits) {           \
    U mask = (U)((bits >= 8 * sizeof(T) ? ~0ul : ((1ul << bits) - 1)) << offset); \
    return (T)(((U)base & ~mask) | (((U)insert << offset) & mask));          \
  }
MSL_INTEGER(char, uchar)
MSL_INTEGER(uchar, uchar)
MSL_INTEGER(short, ushort)
MSL_INTEGER(ushort, ushort)
MSL_INTEGER(int, uint)
MSL_INTEGER(uint, uint)
MSL_INTEGER(long, ulong)
MSL_INTEGER(ulong, ulong)
MSL_FLOAT_ORDER(float)
MSL_FLOAT_ORDER(half)
MSL_FLOAT_ORDER(bfloat)
MSL_AI bool select(bool a, bool b, bool c) { return c ? b : a; }
MSL_V2(min)
MSL_V2(max)
MSL_V3(clamp)
MSL_V2(absdiff)
#define MSL_V1(name)                                                         \
  template <class A, class V = vec_of<A>> MSL_AI V name(A a) {               \
    V r = a;                                                                 \
    for (int i = 0; i < vec_traits<V>::n; i++) r.d[i] = name(r.d[i]);        \
    return r;                                                                \
  }
MSL_V1(abs)
MSL_V1(popcount)
MSL_V1(clz)
MSL_V1(ctz)
MSL_V1(reverse_bits)
template <class A, class B, class V = vec_both<A, B>>
MSL_AI V select(A a, B b, vec<bool, vec_traits<V>::n> c) {
  V r = a, s = b;
  for (int i = 0; i < vec_traits<V>::n; i++) r.d[i] = c.d[i] ? s.d[i] : r.d[i];
  return r;
}
MSL_AI int mulhi(int x, int y) { return (int)((long)x * y >> 32); }
MSL_AI uint mulhi(uint x, uint y) { return (uint)((ulong)x * y >> 32); }
MSL_AI int mad24(int x, int y, int z) { return x * y + z; }
MSL_AI uint mad24(uint x, uint y, uint z) { return x * y + z; }
MSL_AI int mul24(int x, int y) { return x * y; }
MSL_AI uint mul24(uint x, uint y) { return x * y; }

template <class A, class B, class V = vec_both<A, B>> MSL_AI typename vec_traits<V>::elem dot(A a, B b) {
  V x = a, y = b;
  typename vec_traits<V>::elem s = x.d[0] * y.d[0];
  for (int i = 1; i < vec_traits<V>::n; i++) s += x.d[i] * y.d[i];
  return s;
}
template <class A, class V = vec_of<A>> MSL_AI typename vec_traits<V>::elem length_squared(A a) {
  return dot(a, a);
}
template <class A, class V = vec_of<A>> MSL_AI typename vec_traits<V>::elem length(A a) {
  return sqrt(dot(a, a));
}
template <class A, class B, class V = vec_both<A, B>>
MSL_AI typename vec_traits<V>::elem distance(A a, B b) {
  return length(V(a) - V(b));
}
template <class A, class V = vec_of<A>> MSL_AI V normalize(A a) { return V(a) * rsqrt(dot(a, a)); }
} // namespace metal
