// vec<T, N> with Metal's constructors and swizzles.
//
// clang's own vector types lack `float4(half4)` and `float4(a, b, c, d)`, so vectors are a class: a
// union of the components and of one proxy for every swizzle. Arguments come by value, because a
// deduced reference would carry the address space of the argument in its type.
#pragma once
#include "types.h"

namespace metal {
template <class T, int N> struct vec;

template <class T, int N, int... I> struct swz {
  typedef vec<T, sizeof...(I)> value;
  T d[N == 3 ? 4 : N];
  MSL_AI operator value() const { return value(d[I]...); }
  MSL_AI swz& operator=(value v) {
    int k = 0;
    ((d[I] = v.d[k++]), ...);
    return *this;
  }
  MSL_AI swz& operator=(const swz& o) { return *this = value(o); }
  MSL_AI swz& operator+=(value v) { return *this = value(*this) + v; }
  MSL_AI swz& operator-=(value v) { return *this = value(*this) - v; }
  MSL_AI swz& operator*=(value v) { return *this = value(*this) * v; }
  MSL_AI swz& operator/=(value v) { return *this = value(*this) / v; }
  MSL_AI T operator[](int i) const { return value(*this)[i]; }
};

// The swizzles of N components: one level of macros per letter, since macros cannot recurse.
#define MSL_S2(n, A, a, B, b) swz<T, n, A, B> a##b;
#define MSL_S3(n, A, a, B, b, C, c) swz<T, n, A, B, C> a##b##c;
#define MSL_S4(n, A, a, B, b, C, c, D, d) swz<T, n, A, B, C, D> a##b##c##d;
#define MSL_EACH4_2(...) MSL_S4(__VA_ARGS__, 0, x) MSL_S4(__VA_ARGS__, 1, y)
#define MSL_EACH4_3(...) MSL_EACH4_2(__VA_ARGS__) MSL_S4(__VA_ARGS__, 2, z)
#define MSL_EACH4_4(...) MSL_EACH4_3(__VA_ARGS__) MSL_S4(__VA_ARGS__, 3, w)
#define MSL_L3(N, ...) MSL_S3(__VA_ARGS__) MSL_EACH4_##N(__VA_ARGS__)
#define MSL_EACH3_2(...) MSL_L3(2, __VA_ARGS__, 0, x) MSL_L3(2, __VA_ARGS__, 1, y)
#define MSL_EACH3_3(...) \
  MSL_L3(3, __VA_ARGS__, 0, x) MSL_L3(3, __VA_ARGS__, 1, y) MSL_L3(3, __VA_ARGS__, 2, z)
#define MSL_EACH3_4(...)                                    \
  MSL_L3(4, __VA_ARGS__, 0, x) MSL_L3(4, __VA_ARGS__, 1, y) \
  MSL_L3(4, __VA_ARGS__, 2, z) MSL_L3(4, __VA_ARGS__, 3, w)
#define MSL_L2(N, ...) MSL_S2(__VA_ARGS__) MSL_EACH3_##N(__VA_ARGS__)
#define MSL_EACH2_2(...) MSL_L2(2, __VA_ARGS__, 0, x) MSL_L2(2, __VA_ARGS__, 1, y)
#define MSL_EACH2_3(...) \
  MSL_L2(3, __VA_ARGS__, 0, x) MSL_L2(3, __VA_ARGS__, 1, y) MSL_L2(3, __VA_ARGS__, 2, z)
#define MSL_EACH2_4(...)                                    \
  MSL_L2(4, __VA_ARGS__, 0, x) MSL_L2(4, __VA_ARGS__, 1, y) \
  MSL_L2(4, __VA_ARGS__, 2, z) MSL_L2(4, __VA_ARGS__, 3, w)
#define MSL_SWIZZLES_2 MSL_EACH2_2(2, 0, x) MSL_EACH2_2(2, 1, y)
#define MSL_SWIZZLES_3 MSL_EACH2_3(3, 0, x) MSL_EACH2_3(3, 1, y) MSL_EACH2_3(3, 2, z)
#define MSL_SWIZZLES_4 \
  MSL_EACH2_4(4, 0, x) MSL_EACH2_4(4, 1, y) MSL_EACH2_4(4, 2, z) MSL_EACH2_4(4, 3, w)

template <class T, int N> struct vec_data;
template <class T> struct alignas(2 * sizeof(T)) vec_data<T, 2> {
  union { T d[2]; struct { T x, y; }; struct { T r, g; }; MSL_SWIZZLES_2 };
};
template <class T> struct alignas(4 * sizeof(T)) vec_data<T, 3> {
  union { T d[4]; struct { T x, y, z; }; struct { T r, g, b; }; MSL_SWIZZLES_3 };
};
template <class T> struct alignas(4 * sizeof(T)) vec_data<T, 4> {
  union { T d[4]; struct { T x, y, z, w; }; struct { T r, g, b, a; }; MSL_SWIZZLES_4 };
};

// What an argument is: its number of components (0: a scalar), their type, and the vector it makes.
template <class A> struct vec_traits {
  static constexpr __constant int n = 0;
  typedef A elem;
};
template <class T, int N> struct vec_traits<vec<T, N>> {
  static constexpr __constant int n = N;
  typedef T elem;
  typedef vec<T, N> value;
};
template <class T, int N, int... I> struct vec_traits<swz<T, N, I...>> {
  static constexpr __constant int n = sizeof...(I);
  typedef T elem;
  typedef vec<T, sizeof...(I)> value;
};
template <class A> using vec_of = typename vec_traits<A>::value;

template <class T, int N> struct vec : vec_data<T, N> {
  using vec_data<T, N>::d;
  vec() = default;
#ifdef MSL_CHECK // of a constructor that is called, the sanitizer checks the reference's alignment
  MSL_AI vec(const vec& o) { copy(o); }
#else
  vec(const vec&) = default;
#endif
  // From `constant` memory. A template, since a plain one would be a second copy constructor.
  template <class U, class = enable_if_t<is_same_v<U, T>>> MSL_AI vec(const __constant vec<U, N>& o) {
    for (int i = 0; i < N; i++) d[i] = o.d[i];
  }
  MSL_AI vec(T s) {
    for (int i = 0; i < N; i++) d[i] = s;
  }
  template <class U, class = enable_if_t<!is_same_v<U, T>>> MSL_AI explicit vec(vec<U, N> o) {
    for (int i = 0; i < N; i++) d[i] = msl_cast<T>(o.d[i]);
  }
  template <class U, int M, int... I, class = enable_if_t<!is_same_v<U, T> && sizeof...(I) == N>>
  MSL_AI explicit vec(swz<U, M, I...> o) : vec(vec<U, N>(o)) {}
  template <class A, class B, class... R> MSL_AI vec(A a, B b, R... r) { fill<0>(a, b, r...); }
  // Elements of a `constant` table: from numbers only.
  template <class A, class B, class... R>
  constexpr vec(A a, B b, R... r) __constant : vec_data<T, N>{{{T(a), T(b), T(r)...}}} {
    static_assert(sizeof...(R) + 2 == N, "vector constructor: wrong number of parts");
  }

  MSL_AI vec& operator=(const vec& o) {
    copy(o);
    return *this;
  }
  MSL_AI T& operator[](int i) { return d[i]; }
  MSL_AI T operator[](int i) const { return d[i]; }
  MSL_AI T operator[](int i) const __constant { return d[i]; }
#define MSL_ASSIGN(op) \
  template <class B> MSL_AI vec& operator op##=(B b) { return *this = *this op b; }
  MSL_ASSIGN(+) MSL_ASSIGN(-) MSL_ASSIGN(*) MSL_ASSIGN(/) MSL_ASSIGN(%)
  MSL_ASSIGN(&) MSL_ASSIGN(|) MSL_ASSIGN(^) MSL_ASSIGN(<<) MSL_ASSIGN(>>)

private:
  MSL_AI void copy(const vec& o) {
    T t[N];
    for (int i = 0; i < N; i++) t[i] = o.d[i];
    for (int i = 0; i < N; i++) d[i] = t[i];
  }
  template <int K> MSL_AI void fill() { static_assert(K == N, "vector constructor: too few parts"); }
  template <int K, class A, class... R> MSL_AI void fill(A a, R... r) {
    constexpr int n = vec_traits<A>::n;
    static_assert(K + (n ? n : 1) <= N, "vector constructor: too many parts");
    if constexpr (n == 0) {
      d[K] = msl_cast<T>(a);
      fill<K + 1>(r...);
    } else {
      vec_of<A> v = a;
      for (int i = 0; i < n; i++) d[K + i] = msl_cast<T>(v.d[i]);
      fill<K + n>(r...);
    }
  }
};

// The vector type of a binary operation: a scalar takes the other's type, two vectors must agree.
template <class A, class B, int na = vec_traits<A>::n, int nb = vec_traits<B>::n> struct both {};
template <class A, class B, int n> struct both<A, B, n, 0> : vec_traits<A> {};
template <class A, class B, int n> struct both<A, B, 0, n> : vec_traits<B> {};
template <class A, class B> struct both<A, B, 0, 0> {};
template <class A, class B, int n>
struct both<A, B, n, n> : enable_if<
    is_same_v<typename vec_traits<A>::elem, typename vec_traits<B>::elem>, vec_of<A>> {
  typedef typename both::type value;
};
template <class A, class B> using vec_both = typename both<A, B>::value;

#define MSL_BINARY(op)                                                                 \
  template <class A, class B, class V = vec_both<A, B>> MSL_AI V operator op(A a, B b) { \
    V x = a, y = b;                                                                    \
    for (int i = 0; i < vec_traits<V>::n; i++) x.d[i] = x.d[i] op y.d[i];              \
    return x;                                                                          \
  }
#define MSL_COMPARE(op)                                                                \
  template <class A, class B, class V = vec_both<A, B>>                                \
  MSL_AI vec<bool, vec_traits<V>::n> operator op(A a, B b) {                           \
    V x = a, y = b;                                                                    \
    vec<bool, vec_traits<V>::n> r;                                                     \
    for (int i = 0; i < vec_traits<V>::n; i++) r.d[i] = x.d[i] op y.d[i];              \
    return r;                                                                          \
  }
MSL_BINARY(+)
MSL_BINARY(-)
MSL_BINARY(*)
MSL_BINARY(/)
MSL_BINARY(%)
MSL_BINARY(&)
MSL_BINARY(|)
MSL_BINARY(^)
MSL_BINARY(<<)
MSL_BINARY(>>)
MSL_COMPARE(==)
MSL_COMPARE(!=)
MSL_COMPARE(<)
MSL_COMPARE(>)
MSL_COMPARE(<=)
MSL_COMPARE(>=)
MSL_COMPARE(&&)
MSL_COMPARE(||)
template <class A, class V = vec_of<A>> MSL_AI V operator-(A a) {
  V x = a;
  for (int i = 0; i < vec_traits<V>::n; i++) x.d[i] = -x.d[i];
  return x;
}
template <class A, class V = vec_of<A>> MSL_AI V operator~(A a) {
  V x = a;
  for (int i = 0; i < vec_traits<V>::n; i++) x.d[i] = ~x.d[i];
  return x;
}
template <class A, class V = vec_of<A>> MSL_AI vec<bool, vec_traits<V>::n> operator!(A a) {
  V x = a;
  vec<bool, vec_traits<V>::n> r;
  for (int i = 0; i < vec_traits<V>::n; i++) r.d[i] = !x.d[i];
  return r;
}

// A vector without alignment: the components back to back.
template <class T, int N> struct packed_vec {
  T d[N];
  packed_vec() = default;
  MSL_AI packed_vec(vec<T, N> v) {
    for (int i = 0; i < N; i++) d[i] = v.d[i];
  }
  MSL_AI operator vec<T, N>() const {
    vec<T, N> v;
    for (int i = 0; i < N; i++) v.d[i] = d[i];
    return v;
  }
  MSL_AI T& operator[](int i) { return d[i]; }
  MSL_AI T operator[](int i) const { return d[i]; }
};

#define MSL_VECTORS(T)                                                       \
  typedef vec<T, 2> T##2;                                                    \
  typedef vec<T, 3> T##3;                                                    \
  typedef vec<T, 4> T##4;                                                    \
  typedef packed_vec<T, 2> packed_##T##2;                                    \
  typedef packed_vec<T, 3> packed_##T##3;                                    \
  typedef packed_vec<T, 4> packed_##T##4;
MSL_VECTORS(bool)
MSL_VECTORS(char)
MSL_VECTORS(uchar)
MSL_VECTORS(short)
MSL_VECTORS(ushort)
MSL_VECTORS(int)
MSL_VECTORS(uint)
MSL_VECTORS(long)
MSL_VECTORS(ulong)
MSL_VECTORS(float)
MSL_VECTORS(half)
MSL_VECTORS(bfloat)
} // namespace metal
