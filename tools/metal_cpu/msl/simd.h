// Synchronisation: barriers, and the functions by which the lanes of a simdgroup exchange values.
//
// Every lane must reach the same call (same function, same source line); anything else is reported
// as divergence. Metal allows some divergent uses; this project does without them. A value shown to
// others lies in a slot of the worker's state; the last lane to arrive computes a reduction once.
#pragma once
#include "math.h"
#include "state.h"

extern "C" {
// True in the last lane to arrive, which then calls msl_next; false in the others, after that.
bool msl_arrive(uint op, uint line, const __constant char* name);
void msl_next();
void msl_barrier(uint flags, uint line);
void msl_simd_barrier(uint flags, uint line);
device void* msl_array(uint id, uint size, uint align, uint line, const __constant char* name);
void msl_multiply(device float* matrices);
void msl_fail(uint line, const __constant char* text);
}

#if defined(__x86_64__)
MSL_AI ulong msl_sp() { ulong r; __asm__("mov %%rsp, %0" : "=r"(r)); return r; }
#else
MSL_AI ulong msl_sp() { ulong r; __asm__("mov %0, sp" : "=r"(r)); return r; }
#endif
MSL_AI device msl_state* msl_worker() {
  return (device msl_state*)(msl_sp() & ~((1ul << MSL_WORKER_BITS) - 1));
}
MSL_AI uint msl_thread() { return (uint)(msl_sp() >> MSL_STACK_BITS) & (MSL_MAX_THREADS - 1); }
MSL_AI uint msl_lane() { return (uint)(msl_sp() >> MSL_STACK_BITS) & 31; }

#define MSL_AT uint line_ = __builtin_LINE()

namespace metal {
enum class mem_flags : uint {
  mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4, mem_threadgroup_imageblock = 8
};
constexpr mem_flags operator|(mem_flags a, mem_flags b) { return (mem_flags)((uint)a | (uint)b); }
MSL_AI void threadgroup_barrier(mem_flags f, MSL_AT) { msl_barrier((uint)f, line_); }
MSL_AI void simdgroup_barrier(mem_flags f, MSL_AT) { msl_simd_barrier((uint)f, line_); }

// One exchange: shows `v` to the other lanes, returns the slots of all of them.
template <class T> struct msl_shown {
  device msl_state* s;
  uint p;
  MSL_AI T at(uint lane) const { return *(device T*)&s->slot[p][lane & 31][0]; }
  MSL_AI uint n() const { return s->n_lanes; }
};
template <class T> MSL_AI msl_shown<T> msl_show(T v, uint line, const __constant char* name) {
  static_assert(sizeof(T) <= 16, "a lane can show at most 16 bytes");
  device msl_state* s = msl_worker();
  msl_shown<T> all = {s, s->parity};
  *(device T*)&s->slot[all.p][msl_lane()][0] = v;
  if (msl_arrive(MSL_SIMD_OP, line, name)) msl_next();
  return all;
}

#define MSL_REDUCE(name, expr)                                                      \
  template <class T> MSL_AI T name(T v, MSL_AT) {                                   \
    device msl_state* s = msl_worker();                                             \
    msl_shown<T> all = {s, s->parity};                                              \
    *(device T*)&s->slot[all.p][msl_lane()][0] = v;                                 \
    if (msl_arrive(MSL_SIMD_OP, line_, #name)) {                                    \
      T a = all.at(0);                                                              \
      for (uint i = 1, n = all.n(); i < n; i++) {                                   \
        T b = all.at(i);                                                            \
        a = T(expr);                                                                \
      }                                                                             \
      *(device T*)&s->result[all.p][0] = a;                                         \
      msl_next();                                                                   \
    }                                                                               \
    return *(device T*)&s->result[all.p][0];                                        \
  }                                                                                 \
  template <class T, int N, int... I> MSL_AI vec<T, sizeof...(I)> name(swz<T, N, I...> v, MSL_AT) { \
    return name(vec<T, sizeof...(I)>(v), line_);                                    \
  }
MSL_REDUCE(simd_sum, a + b)
MSL_REDUCE(simd_product, a * b)
MSL_REDUCE(simd_max, max(a, b))
MSL_REDUCE(simd_min, min(a, b))
MSL_REDUCE(simd_and, a & b)
MSL_REDUCE(simd_or, a | b)
MSL_REDUCE(simd_xor, a ^ b)

struct simd_vote {
  typedef ulong vote_t;
  ulong bits;
  MSL_AI explicit simd_vote(ulong b = 0) : bits(b) {}
  MSL_AI explicit operator vote_t() const { return bits; }
  MSL_AI bool any() const { return bits != 0; }
};
MSL_AI simd_vote simd_ballot(bool v, MSL_AT) {
  return simd_vote(simd_or((ulong)v << msl_lane(), line_));
}
MSL_AI bool simd_all(bool v, MSL_AT) { return simd_min((uint)v, line_) != 0; }
MSL_AI bool simd_any(bool v, MSL_AT) { return simd_max((uint)v, line_) != 0; }
MSL_AI simd_vote simd_active_threads_mask(MSL_AT) { return simd_ballot(true, line_); }
MSL_AI bool simd_is_first() { return msl_lane() == 0; }

// A lane outside the simdgroup gives the reader its own value back (Metal leaves it undefined).
#define MSL_SHUFFLE(name, param, source)                                            \
  template <class T> MSL_AI T name(T v, param, MSL_AT) {                            \
    msl_shown<T> all = msl_show(v, line_, #name);                                   \
    uint lane = msl_lane(), from = (source);                                        \
    return from < all.n() ? all.at(from) : all.at(lane);                            \
  }
MSL_SHUFFLE(simd_shuffle, ushort k, k)
MSL_SHUFFLE(simd_broadcast, ushort k, k)
MSL_SHUFFLE(simd_shuffle_xor, ushort mask, lane ^ mask)
MSL_SHUFFLE(simd_shuffle_down, ushort delta, lane + delta)
MSL_SHUFFLE(simd_shuffle_up, ushort delta, lane >= delta ? lane - delta : lane)
MSL_SHUFFLE(simd_shuffle_rotate_down, ushort delta, (lane + delta) % all.n())
MSL_SHUFFLE(simd_shuffle_rotate_up, ushort delta, (lane + all.n() - delta % all.n()) % all.n())
MSL_SHUFFLE(quad_shuffle, ushort k, (lane & ~3u) | (k & 3))
MSL_SHUFFLE(quad_broadcast, ushort k, (lane & ~3u) | (k & 3))
MSL_SHUFFLE(quad_shuffle_xor, ushort mask, lane ^ (mask & 3))
MSL_SHUFFLE(quad_shuffle_down, ushort delta, (lane & 3) + delta < 4 ? lane + delta : lane)
MSL_SHUFFLE(quad_shuffle_up, ushort delta, (lane & 3) >= delta ? lane - delta : lane)
template <class T> MSL_AI T simd_broadcast_first(T v, MSL_AT) { return simd_broadcast(v, 0, line_); }
template <class T> MSL_AI T simd_shuffle_and_fill_up(T v, T fill, ushort delta, MSL_AT) {
  msl_shown<T> all = msl_show(v, line_, "simd_shuffle_and_fill_up");
  T own = msl_show(fill, line_, "simd_shuffle_and_fill_up").at(all.n() - delta + msl_lane());
  T other = simd_shuffle_up(v, delta, line_);
  return msl_lane() >= delta ? other : own;
}
template <class T> MSL_AI T simd_shuffle_and_fill_down(T v, T fill, ushort delta, MSL_AT) {
  msl_shown<T> all = msl_show(v, line_, "simd_shuffle_and_fill_down");
  T own = msl_show(fill, line_, "simd_shuffle_and_fill_down").at(msl_lane() + delta - all.n());
  T other = simd_shuffle_down(v, delta, line_);
  return msl_lane() + delta < all.n() ? other : own;
}

#define MSL_PREFIX(name, first, start, expr)                                        \
  template <class T> MSL_AI T name(T v, MSL_AT) {                                   \
    msl_shown<T> all = msl_show(v, line_, #name);                                   \
    T a = T(start);                                                                 \
    for (uint i = 0, n = msl_lane() + first; i < n; i++) {                          \
      T b = all.at(i);                                                              \
      a = T(expr);                                                                  \
    }                                                                               \
    return a;                                                                       \
  }
MSL_PREFIX(simd_prefix_inclusive_sum, 1, 0, a + b)
MSL_PREFIX(simd_prefix_exclusive_sum, 0, 0, a + b)
MSL_PREFIX(simd_prefix_inclusive_product, 1, 1, a * b)
MSL_PREFIX(simd_prefix_exclusive_product, 0, 1, a * b)

#define MSL_QUAD(name, expr)                                                        \
  template <class T> MSL_AI T name(T v, MSL_AT) {                                   \
    msl_shown<T> all = msl_show(v, line_, #name);                                   \
    uint q = msl_lane() & ~3u;                                                      \
    T a = all.at(q);                                                                \
    for (uint i = q + 1; i < q + 4 && i < all.n(); i++) {                           \
      T b = all.at(i);                                                              \
      a = T(expr);                                                                  \
    }                                                                               \
    return a;                                                                       \
  }
MSL_QUAD(quad_sum, a + b)
MSL_QUAD(quad_product, a * b)
MSL_QUAD(quad_max, max(a, b))
MSL_QUAD(quad_min, min(a, b))
MSL_QUAD(quad_and, a & b)
MSL_QUAD(quad_or, a | b)
MSL_QUAD(quad_xor, a ^ b)
MSL_AI bool quad_all(bool v, MSL_AT) { return quad_min((uint)v, line_) != 0; }
MSL_AI bool quad_any(bool v, MSL_AT) { return quad_max((uint)v, line_) != 0; }
} // namespace metal
