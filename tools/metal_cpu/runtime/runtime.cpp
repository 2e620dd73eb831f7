// Runs a kernel's threads as fibers: rounds of lanes, simdgroups, threadgroups, workers.
//
// A round lets every lane of one simdgroup run until it blocks. Then all of them must have arrived
// at the same place: a simdgroup operation (the next round follows), a threadgroup barrier (the next
// simdgroup runs; when all have arrived, all go on) or the kernel's end. Anything else is divergence.
#include "runtime.h"
#include <errno.h>
#include <stdlib.h>
#include <string.h>

extern "C" void msl_switch(void** save, void* load);
extern "C" void msl_resume();

#if defined(__APPLE__)
#define SYMBOL(name) "_" name
#else
#define SYMBOL(name) name
#endif

#if defined(__x86_64__)
enum { FRAME_WORDS = 8 };
asm(".text\n.globl " SYMBOL("msl_switch") "\n.globl " SYMBOL("msl_resume") "\n"
    SYMBOL("msl_switch") ":\n"
    "  push %rbp\n  push %rbx\n  push %r12\n  push %r13\n  push %r14\n  push %r15\n"
    "  mov %rsp, (%rdi)\n  mov %rsi, %rsp\n"
    SYMBOL("msl_resume") ":\n"
    "  pop %r15\n  pop %r14\n  pop %r13\n  pop %r12\n  pop %rbx\n  pop %rbp\n  ret\n");
#elif defined(__aarch64__)
enum { FRAME_WORDS = 20 };
asm(".text\n.globl " SYMBOL("msl_switch") "\n.globl " SYMBOL("msl_resume") "\n"
    SYMBOL("msl_switch") ":\n"
    "  sub sp, sp, #160\n"
    "  stp x19, x20, [sp]\n  stp x21, x22, [sp, #16]\n  stp x23, x24, [sp, #32]\n"
    "  stp x25, x26, [sp, #48]\n  stp x27, x28, [sp, #64]\n  stp x29, x30, [sp, #80]\n"
    "  stp d8, d9, [sp, #96]\n  stp d10, d11, [sp, #112]\n  stp d12, d13, [sp, #128]\n"
    "  stp d14, d15, [sp, #144]\n"
    "  mov x9, sp\n  str x9, [x0]\n  mov sp, x1\n"
    SYMBOL("msl_resume") ":\n"
    "  ldp x19, x20, [sp]\n  ldp x21, x22, [sp, #16]\n  ldp x23, x24, [sp, #32]\n"
    "  ldp x25, x26, [sp, #48]\n  ldp x27, x28, [sp, #64]\n  ldp x29, x30, [sp, #80]\n"
    "  ldp d8, d9, [sp, #96]\n  ldp d10, d11, [sp, #112]\n  ldp d12, d13, [sp, #128]\n"
    "  ldp d14, d15, [sp, #144]\n"
    "  add sp, sp, #160\n  ret\n");
#else
#error "tools/metal_cpu knows x86-64 and aarch64"
#endif

static inline uint64_t next_random(Worker* w) {
  uint64_t x = w->random;
  x ^= x << 13, x ^= x >> 7, x ^= x << 17;
  return w->random = x;
}

static void shuffle(Worker* w, uint8_t* order, uint32_t n) {
  for (uint32_t i = 0; i < n; i++) order[i] = i;
  if (w->launch->seed == 0) return;
  for (uint32_t i = n; i > 1; i--) {
    uint32_t j = next_random(w) % i;
    uint8_t t = order[i - 1];
    order[i - 1] = order[j], order[j] = t;
  }
}

// ---- rounds ---------------------------------------------------------------------------------

static void begin_round(Worker* w) {
  msl_state& s = w->s;
  s.pos = ~0u;
  s.n_round = s.n_lanes;
  const uint8_t* order = w->perms[w->perm++ & 63];
  if (s.n_lanes < 32) {
    uint32_t n = 0;
    for (uint32_t i = 0; i < 32; i++) {
      if (order[i] < s.n_lanes) w->partial[n++] = order[i];
    }
    order = w->partial;
  }
  w->order = order;
}

static void begin_simdgroup(Worker* w) {
  msl_state& s = w->s;
  s.sg = w->groups[w->group_pos];
  uint32_t rest = s.n_threads - 32 * s.sg;
  s.n_lanes = rest < 32 ? rest : 32;
  begin_round(w);
}

static void diverged(Worker* w, uint32_t a, uint32_t b) {
  msl_report* r = add_report(w, DIVERGENT, w->site[a] & 0xffffff);
  r->other_line = w->site[b] & 0xffffff;
  r->thread = a, r->other_thread = b;
  strncpy(r->text, w->name[a], 40);
  strncat(r->text, "|", 1);
  strncat(r->text, w->name[b], 40);
  stop(w);
}

// All simdgroups have arrived at a barrier or ended: they must agree.
static void end_phase(Worker* w) {
  uint32_t site = w->site[0];
  for (uint32_t g = 1; g < w->s.n_simdgroups; g++) {
    if (w->site[32 * g] != site) {
      bool first = site >> 24 == MSL_BARRIER;
      diverged(w, first ? 0 : 32 * g, first ? 32 * g : 0);
    }
  }
  if (site >> 24 == MSL_EXIT) {
    w->done = 1;
    return;
  }
  w->group_pos = 0;
  shuffle(w, w->groups, w->s.n_simdgroups);
  begin_simdgroup(w);
}

static void next_simdgroup(Worker* w) {
  if (++w->group_pos < w->s.n_simdgroups) {
    begin_simdgroup(w);
  } else {
    end_phase(w);
  }
}

static void end_round(Worker* w) {
  msl_state& s = w->s;
  uint32_t t0 = 32 * s.sg, differs = 0;
  for (uint32_t i = 1; i < s.n_lanes; i++) differs |= w->site[t0 + i] ^ w->site[t0];
  if (differs) {
    uint32_t a = t0, b = t0;
    while (w->site[b] == w->site[a]) b++;
    bool ended = w->site[a] >> 24 == MSL_EXIT;
    diverged(w, ended ? b : a, ended ? a : b);
  }
  if (s.check) check_round(w);
  uint32_t op = w->site[t0] >> 24;
  s.parity ^= 1;
  if (op == MSL_EXIT || op == MSL_BARRIER) {
    next_simdgroup(w);
  } else {
    begin_round(w);
  }
}

// Blocks the lane. The last lane of the round gets true: it does what is done once, then calls
// msl_next to let the others go on. They get false, after that.
extern "C" bool msl_arrive(uint32_t op, uint32_t line, const char* name) {
  Worker* w = worker();
  uint32_t t = thread_index();
  w->site[t] = op << 24 | line;
  w->name[t] = name;
  if (w->s.pos + 1 < w->s.n_round) {
    msl_switch(&w->sp[t], w->sp[32 * w->s.sg + w->order[++w->s.pos]]);
    return false;
  }
  end_round(w);
  return true;
}

extern "C" void msl_next() {
  Worker* w = worker();
  uint32_t t = thread_index();
  if (w->done) {
    msl_switch(&w->sp[t], w->main_sp);
    return;
  }
  uint32_t next = 32 * w->s.sg + w->order[++w->s.pos];
  if (next != t) msl_switch(&w->sp[t], w->sp[next]);
}

extern "C" void msl_barrier(uint32_t flags, uint32_t line) {
  Worker* w = worker();
  if (!msl_arrive(MSL_BARRIER, line, "threadgroup_barrier")) return;
  if (w->group_pos == 0) { // the last simdgroup, too
    if (flags & 1) w->epoch[DEVICE_EPOCH]++;
    if (flags & 2) w->epoch[GROUP_EPOCH]++;
  }
  msl_next();
}

extern "C" void msl_simd_barrier(uint32_t flags, uint32_t line) {
  Worker* w = worker();
  if (!msl_arrive(MSL_SIMD_BARRIER, line, "simdgroup_barrier")) return;
  if (flags & 1) w->simd_epoch[DEVICE_EPOCH][w->s.sg]++;
  if (flags & 2) w->simd_epoch[GROUP_EPOCH][w->s.sg]++;
  msl_next();
}

// ---- reports --------------------------------------------------------------------------------

static uint32_t report_lock;

msl_report* add_report(Worker* w, uint32_t kind, uint32_t line) {
  static msl_report overflow;
  while (__atomic_exchange_n(&report_lock, 1, __ATOMIC_ACQUIRE)) {}
  msl_launch* l = w->launch;
  msl_report* r = l->n_reports < MAX_REPORTS ? &l->reports[l->n_reports++] : &overflow;
  __atomic_store_n(&report_lock, 0, __ATOMIC_RELEASE);
  memset(r, 0, sizeof *r);
  r->kind = kind, r->line = line, r->count = 1;
  for (int i = 0; i < 3; i++) r->group[i] = w->ids.threadgroup_position[i];
  r->thread = thread_index(), r->buffer = MAX_BUFFERS;
  return r;
}

void stop(Worker* w) {
  w->failed = 1;
  void* unused;
  msl_switch(&unused, w->main_sp);
  __builtin_unreachable();
}

extern "C" void msl_fail(uint32_t line, const char* text) {
  Worker* w = worker();
  strncpy(add_report(w, FAILED_CHECK, line)->text, text, 95);
  stop(w);
}

// ---- what the compiler calls -------------------------------------------------------------------

// float -> bfloat, to the nearest, ties to even; NaN stays NaN. No library is linked that has it.
extern "C" __bf16 __truncsfbf2(float x) {
  uint32_t u = __builtin_bit_cast(uint32_t, x);
  uint16_t r = (u + 0x7fff + (u >> 16 & 1)) >> 16;
  if ((u & 0x7fffffff) > 0x7f800000) r = u >> 16 | 0x40;
  return __builtin_bit_cast(__bf16, r);
}

// d = a b + c of four 8x8 matrices in a row: a, b, c, d. In ascending k, each step rounded once.
extern "C" void msl_multiply(float* m) {
  const float *a = m, *b = m + 64, *c = m + 128;
  for (int r = 0; r < 8; r++) {
    float sum[8];
    for (int j = 0; j < 8; j++) sum[j] = c[r * 8 + j];
    for (int k = 0; k < 8; k++) {
      for (int j = 0; j < 8; j++) sum[j] = __builtin_fmaf(a[r * 8 + k], b[k * 8 + j], sum[j]);
    }
    for (int j = 0; j < 8; j++) m[192 + r * 8 + j] = sum[j];
  }
}

// ---- threadgroup memory -----------------------------------------------------------------------

// Arrays lie apart in the arena, so that an overrun falls between them, and in check mode no better
// aligned than declared. The first lane to reach a declaration places the array; it is garbage then.
extern "C" void* msl_array(uint32_t id, uint32_t size, uint32_t align, uint32_t line,
                           const char* name) {
  Worker* w = worker();
  Array& a = w->arrays[id];
  if (__builtin_expect(a.seen, 1)) return w->arena + a.offset;
  uint32_t total = size;
  for (uint32_t i = 0; i < MSL_MAX_ARRAYS; i++) total += w->arrays[i].seen ? w->arrays[i].size : 0;
  if (total > MSL_TG_BYTES) {
    msl_report* r = add_report(w, TOO_MUCH_THREADGROUP_MEMORY, line);
    r->size = total;
    strncpy(r->text, name, 95);
    stop(w);
  }
  a = {w->array_end + (w->s.check && align < 64 ? align : 0), size, line, 1};
  w->array_end = (a.offset + size + 256 + 63) & ~63u;
  memset(w->arena + a.offset, w->launch->seed ? (int)(next_random(w) | 0x81) : 0xff, size);
  if (w->s.check) check_array(w, id);
  msl_launch* l = w->launch;
  strncpy(l->arrays[id], name, 31);
  l->array_sizes[id] = size;
  return w->arena + a.offset;
}

// ---- threads and threadgroups -----------------------------------------------------------------

static void lane_main() {
  Worker* w = worker();
  msl_ids& d = w->ids;
  uint32_t t = thread_index();
  const uint32_t* n = d.threads_per_threadgroup;
  d.index = t;
  d.position_in_threadgroup[0] = t % n[0];
  d.position_in_threadgroup[1] = t / n[0] % n[1];
  d.position_in_threadgroup[2] = t / (n[0] * n[1]);
  for (int i = 0; i < 3; i++) {
    d.position_in_grid[i] =
        d.threadgroup_position[i] * d.dispatch_threads[i] + d.position_in_threadgroup[i];
  }
  w->launch->entry(w->bases, &d);
  msl_arrive(MSL_EXIT, 0, "the end of the kernel");
  msl_next();
  __builtin_trap();
}

// The stacks start at different cache sets: 128 KiB apart, all would share a few.
static void prepare_lane(Worker* w, uint32_t t) {
  uintptr_t top = (uintptr_t)w + MSL_STACK0 + ((uintptr_t)(t + 1) << MSL_STACK_BITS);
  uint64_t* sp = (uint64_t*)(top - 64 - (t & 63) * 192) - FRAME_WORDS;
#if defined(__x86_64__)
  sp[5] = 0, sp[6] = (uint64_t)lane_main, sp[7] = 0; // at a function's start sp = 8 mod 16
#else
  sp[10] = 0, sp[11] = (uint64_t)lane_main;
#endif
  w->sp[t] = sp;
}

static void run_group(Worker* w, uint64_t number) {
  msl_ids& d = w->ids;
  msl_state& s = w->s;
  uint32_t n = 1;
  for (int i = 0; i < 3; i++) {
    uint32_t g = number % d.threadgroups_per_grid[i];
    number /= d.threadgroups_per_grid[i];
    uint32_t rest = d.threads_per_grid[i] - g * d.dispatch_threads[i];
    d.threadgroup_position[i] = g;
    d.threads_per_threadgroup[i] = rest < d.dispatch_threads[i] ? rest : d.dispatch_threads[i];
    n *= d.threads_per_threadgroup[i];
  }
  d.n_threads = s.n_threads = n;
  s.n_simdgroups = (n + 31) / 32;
  w->done = 0, w->group_pos = 0, w->array_end = 256;
  for (Array& a : w->arrays) a.seen = 0;
  w->epoch[0]++, w->epoch[1]++;
  w->first_epoch = w->epoch[0] > w->epoch[1] ? w->epoch[0] : w->epoch[1];
  w->epoch[0] = w->epoch[1] = w->first_epoch;
  for (uint32_t t = 0; t < n; t++) prepare_lane(w, t);
  if (s.check) check_group(w);
  shuffle(w, w->groups, s.n_simdgroups);
  begin_simdgroup(w);
  s.pos = 0;
  msl_switch(&w->main_sp, w->sp[32 * s.sg + w->order[0]]);
}

void prepare_worker(Worker* w, msl_launch* l, const uint64_t* bases, uint32_t number) {
  w->launch = l, w->failed = 0;
  memcpy(w->bases, bases, l->n_buffers * sizeof *bases);
  w->s.check = l->check, w->s.parity = 0;
  w->random = (l->seed + 1) * 0x9e3779b97f4a7c15ull + number * 0xd1b54a32d192ed03ull;
  if (w->perm_seed != l->seed + 1) {
    w->perm_seed = l->seed + 1;
    for (auto& p : w->perms) shuffle(w, p, 32);
  }
  msl_ids& d = w->ids;
  d.n_dispatch = 1;
  for (int i = 0; i < 3; i++) {
    d.threads_per_grid[i] = l->grid[i];
    d.dispatch_threads[i] = l->group[i];
    d.threadgroups_per_grid[i] = (l->grid[i] + l->group[i] - 1) / l->group[i];
    d.n_dispatch *= l->group[i];
  }
}

// Takes threadgroups from the shared counter until none is left or somebody failed. Of the grid's
// n_all, n_groups are run.
void run_worker(Worker* w, uint64_t n_groups, uint64_t n_all, uint64_t* counter, uint32_t* failed) {
  uint64_t step = 1, start = 0;
  if (w->launch->seed && n_groups > 1) {
    uint64_t x = w->launch->seed * 0x9e3779b97f4a7c15ull >> 20;
    start = x % n_groups, step = x / n_groups % n_groups;
    for (;; step++) {
      uint64_t a = step, b = n_groups;
      while (b) { uint64_t t = a % b; a = b, b = t; }
      if (a == 1) break;
    }
  }
  for (;;) {
    uint64_t i = __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED);
    if (i >= n_groups || __atomic_load_n(failed, __ATOMIC_RELAXED)) return;
    w->group_number = i;
    run_group(w, (i * step + start) % n_groups * n_all / n_groups);
    if (w->failed) __atomic_store_n(failed, 1, __ATOMIC_RELAXED);
  }
}
