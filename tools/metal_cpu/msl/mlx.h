// What MLX puts before every kernel it compiles at run time, as far as kernels may use it: the names
// and meanings of its preamble, written anew.
#pragma once
#include "math.h"

typedef half float16_t;
typedef bfloat bfloat16_t;
struct complex64_t {
  float real, imag;
  complex64_t() = default;
  complex64_t(float r, float i = 0) : real(r), imag(i) {}
};
METAL_FUNC complex64_t operator+(complex64_t a, complex64_t b) {
  return complex64_t(a.real + b.real, a.imag + b.imag);
}
METAL_FUNC complex64_t operator-(complex64_t a, complex64_t b) {
  return complex64_t(a.real - b.real, a.imag - b.imag);
}
METAL_FUNC complex64_t operator*(complex64_t a, complex64_t b) {
  return complex64_t(a.real * b.real - a.imag * b.imag, a.real * b.imag + a.imag * b.real);
}
#define MLX_MTL_PRAGMA_UNROLL _Pragma("clang loop unroll(full)")
#define MLX_MTL_CONST static constant constexpr const

template <class T> struct Limits {
  static constexpr T min_of() {
    if constexpr (metal::is_floating_point_v<T>) return (T)-INFINITY;
    else return metal::numeric_limits<T>::min();
  }
  static constexpr T max_of() {
    if constexpr (metal::is_floating_point_v<T>) return (T)INFINITY;
    else return metal::numeric_limits<T>::max();
  }
  static constexpr __constant T max = max_of();
  static constexpr __constant T min = min_of();
  static constexpr __constant T finite_max = metal::numeric_limits<T>::max();
  static constexpr __constant T finite_min = metal::numeric_limits<T>::lowest();
};

// The offset, in elements, of the element with row-major number `elem`.
template <class I = int64_t>
METAL_FUNC I elem_to_loc(I elem, const __constant int* shape, const __constant int64_t* strides, int ndim) {
  I loc = 0;
  for (int i = ndim - 1; i >= 0 && elem > 0; --i) {
    loc += (elem % shape[i]) * I(strides[i]);
    elem /= shape[i];
  }
  return loc;
}
template <class I = int64_t>
METAL_FUNC I elem_to_loc(metal::uint3 elem, const __constant int* shape, const __constant int64_t* strides,
                         int ndim) {
  I loc = I(elem.x) * I(strides[ndim - 1]) + I(elem.y) * I(strides[ndim - 2]);
  for (int d = ndim - 3; d >= 0; --d) {
    loc += (elem.z % shape[d]) * I(strides[d]);
    elem.z /= shape[d];
  }
  return loc;
}
template <class T, class U> METAL_FUNC T ceildiv(T n, U m) { return (n + m - 1) / m; }
