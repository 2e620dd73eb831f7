// Atomics on device and threadgroup memory; only relaxed order exists in Metal.
//
// The builtins work on words through generic pointers: they want all pointers in one address space.
#pragma once
#include "types.h"

// OpenCL has names of its own for these.
#define atomic_int msl_atomic_int
#define atomic_uint msl_atomic_uint
#define atomic_float msl_atomic_float
#define atomic_long msl_atomic_long
#define atomic_ulong msl_atomic_ulong

namespace metal {
enum memory_order { memory_order_relaxed = 0 };
template <class T> struct atomic {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "no such atomic type");
  T value;
};
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<float> atomic_float;
typedef atomic<ulong> atomic_ulong;

template <class T> struct msl_same { typedef T type; };
template <class T> using msl_value = typename msl_same<T>::type; // not deduced: converts
template <class T> using msl_word = conditional_t<sizeof(T) == 4, uint, ulong>;

template <class T> MSL_AI T msl_atomic_load(msl_word<T>* p) {
  return as_type<T>(__atomic_load_n(p, __ATOMIC_RELAXED));
}
template <class T> MSL_AI bool msl_atomic_swap(msl_word<T>* p, T* expected, T v) {
  msl_word<T> was = as_type<msl_word<T>>(*expected);
  bool done = __atomic_compare_exchange_n(p, (msl_word<T>*)&was, as_type<msl_word<T>>(v), false,
                                          __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  *expected = as_type<T>(was);
  return done;
}

#define MSL_ATOMIC_UPDATE(space, name, expr)                                              \
  template <class T>                                                                      \
  MSL_AI T name(volatile space atomic<T>* p, msl_value<T> b, memory_order) {              \
    msl_word<T>* q = (msl_word<T>*)(space msl_word<T>*)&p->value;                         \
    T a = msl_atomic_load<T>(q);                                                          \
    while (!msl_atomic_swap<T>(q, (T*)&a, T(expr))) {}                                    \
    return a;                                                                             \
  }
#define MSL_ATOMICS(space)                                                                \
  template <class T>                                                                      \
  MSL_AI T atomic_load_explicit(const volatile space atomic<T>* p, memory_order) {        \
    return msl_atomic_load<T>((msl_word<T>*)(space msl_word<T>*)&p->value);               \
  }                                                                                       \
  template <class T>                                                                      \
  MSL_AI void atomic_store_explicit(volatile space atomic<T>* p, msl_value<T> v, memory_order) { \
    __atomic_store_n((msl_word<T>*)(space msl_word<T>*)&p->value, as_type<msl_word<T>>(v), \
                     __ATOMIC_RELAXED);                                                   \
  }                                                                                       \
  template <class T>                                                                      \
  MSL_AI bool atomic_compare_exchange_weak_explicit(                                      \
      volatile space atomic<T>* p, thread T* expected, msl_value<T> v, memory_order, memory_order) { \
    return msl_atomic_swap<T>((msl_word<T>*)(space msl_word<T>*)&p->value, expected, v);  \
  }                                                                                       \
  MSL_ATOMIC_UPDATE(space, atomic_exchange_explicit, b)                                   \
  MSL_ATOMIC_UPDATE(space, atomic_fetch_add_explicit, a + b)                              \
  MSL_ATOMIC_UPDATE(space, atomic_fetch_sub_explicit, a - b)                              \
  MSL_ATOMIC_UPDATE(space, atomic_fetch_min_explicit, b < a ? b : a)                      \
  MSL_ATOMIC_UPDATE(space, atomic_fetch_max_explicit, a < b ? b : a)                      \
  MSL_ATOMIC_UPDATE(space, atomic_fetch_and_explicit, a & b)                              \
  MSL_ATOMIC_UPDATE(space, atomic_fetch_or_explicit, a | b)                               \
  MSL_ATOMIC_UPDATE(space, atomic_fetch_xor_explicit, a ^ b)
MSL_ATOMICS(device)
MSL_ATOMICS(threadgroup)
} // namespace metal
