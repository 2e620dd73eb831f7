// The Metal shading language on clang's "C++ for OpenCL" front end, whose address spaces are Metal's.
#pragma once
#pragma clang system_header
#define __METAL__ 1
#define __METAL_VERSION__ 310
#define device __global
#define threadgroup __local
#define thread __private
#include "types.h"
#include "vec.h"
#include "math.h"
#include "simd.h"
#include "matrix.h"
#include "atomic.h"
#include "mlx.h"

// An argument of the kernel: a pointer of whatever type the signature asks for.
struct msl_any {
  ulong p;
  template <class T> operator device T*() const { return (device T*)p; }
  template <class T> operator const __constant T*() const { return (const __constant T*)p; }
  template <class T> operator const __constant T&() const { return *(const __constant T*)p; }
  template <class T> operator const device T&() const { return *(const device T*)p; }
};

using namespace metal;
#define constant const __constant
#pragma GCC poison double
