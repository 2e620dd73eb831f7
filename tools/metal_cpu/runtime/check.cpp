// Check mode: every load and store of the kernel, as ThreadSanitizer's instrumentation hands it over.
//
// Outputs and threadgroup memory have a cell per byte that remembers the last write and the last
// reads: who, where, and in which epoch. An epoch ends at a threadgroup_barrier that names that kind
// of memory; within it, a simdgroup_barrier orders the lanes of one simdgroup. Two threads that touch
// a byte in the same epoch, one of them writing and not both atomically, race. Threadgroups are never
// ordered. Inputs are read only, so their accesses are checked for bounds and counted.
#include "runtime.h"
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

struct Cell {
  uint32_t w_epoch, r_epoch;   // 0: never; 1: by the host before the launch
  uint32_t w_pc, r_pc;
  uint16_t w_thread, r_thread; // with the flags below
  uint16_t w_simd, r_simd;     // epoch of the simdgroup
};
enum : uint32_t { HOST = 1 };
enum : uint16_t { THREAD = 0x3ff, ATOMIC = 0x8000, MANY_LANES = 0x4000, MANY_GROUPS = 0x2000 };

struct Shadow {
  Cell* cells;                 // of an output; null for an input
  uint8_t* seen;               // per byte: touched by anybody
};
static Shadow shadows[MAX_BUFFERS];
static Cell arena_cells[ARENA_BYTES];
static uint8_t arena_owner[ARENA_BYTES / 64]; // array id + 1 of every 64 bytes
static uint64_t library;
static uint32_t last_buffer;
static const int64_t NEAR = 1 << 20;          // the guards around a buffer

// ---- simdgroup accesses -------------------------------------------------------------------------

// What a lane did since its simdgroup last met, in pieces of 16 bytes: the most one instruction of a
// GPU moves. The k-th run of the same instruction in every lane is one access of the simdgroup.
struct Entry {
  uint32_t pc;
  uint8_t buffer, write;
  uint16_t bytes;              // which of the 16
  uint64_t block;              // offset in the buffer / 16
};
enum { LOG_ENTRIES = 1 << 16 };   // per lane; later accesses are left out of the line counts
enum { LOOK_BACK = 4 };
static Entry* logs[32];
static uint32_t n_log[32];

// The components of a vector come one by one: bytes of a block that was just touched, and that were
// not touched with it, belong to the same access.
static void log_access(uint32_t lane, Entry entry) {
  if (!logs[lane]) logs[lane] = (Entry*)malloc(LOG_ENTRIES * sizeof(Entry));
  uint32_t n = n_log[lane];
  for (uint32_t k = n; k > 0 && k + LOOK_BACK > n; k--) {
    Entry& e = logs[lane][k - 1];
    if (e.block == entry.block && e.buffer == entry.buffer && e.write == entry.write) {
      if (e.bytes & entry.bytes) break;
      e.bytes |= entry.bytes;
      return;
    }
  }
  if (n < LOG_ENTRIES) logs[lane][n_log[lane]++] = entry;
}

static void log_bytes(uint32_t lane, uint32_t pc, uint32_t buffer, uint64_t offset, uint32_t size,
                      bool write) {
  uint64_t block = offset >> 4;
  uint32_t bytes = ((1u << size) - 1) << (offset & 15);
  log_access(lane, {pc, (uint8_t)buffer, write, (uint16_t)bytes, block});
  if (bytes >> 16) log_access(lane, {pc, (uint8_t)buffer, write, (uint16_t)(bytes >> 16), block + 1});
}

static int by_place(const void* a, const void* b) {
  const Entry *x = *(const Entry* const*)a, *y = *(const Entry* const*)b;
  if (x->buffer != y->buffer) return x->buffer < y->buffer ? -1 : 1;
  return x->block < y->block ? -1 : x->block > y->block;
}

// Adds the distinct bytes and lines of one access of a simdgroup, at most 32 entries.
static void count_lines(msl_launch* l, const Entry** entries, uint32_t n) {
  for (uint32_t i = 1; i < n; i++) { // almost always sorted already
    if (by_place(&entries[i - 1], &entries[i]) > 0) {
      qsort(entries, n, sizeof *entries, by_place);
      break;
    }
  }
  for (uint32_t i = 0, j; i < n; i = j) {
    const Entry& e = *entries[i];
    uint32_t bytes = 0;
    for (j = i; j < n && !by_place(&entries[i], &entries[j]); j++) bytes |= entries[j]->bytes;
    msl_buffer& b = l->buffers[e.buffer];
    b.useful += __builtin_popcount(bytes);
    const Entry* before = i ? entries[i - 1] : nullptr;
    if (!before || before->buffer != e.buffer || before->block >> 3 != e.block >> 3) b.lines++;
  }
}

struct Numbered {
  uint32_t pc, occurrence;
  const Entry* entry;
};

static int by_occurrence(const void* a, const void* b) {
  const Numbered *x = (const Numbered*)a, *y = (const Numbered*)b;
  if (x->pc != y->pc) return x->pc < y->pc ? -1 : 1;
  if (x->occurrence != y->occurrence) return x->occurrence < y->occurrence ? -1 : 1;
  return x->entry < y->entry ? -1 : 1;
}

// Lanes took different ways: number the runs of every instruction in every lane, sort, and group.
static void count_diverged(msl_launch* l, uint32_t n_lanes, uint32_t total) {
  enum { SLOTS = 4096 };
  static uint32_t pcs[SLOTS], counts[SLOTS];
  Numbered* all = (Numbered*)malloc((total + 1) * sizeof *all);
  uint32_t n = 0;
  for (uint32_t lane = 0; lane < n_lanes; lane++) {
    memset(pcs, 0, sizeof pcs);
    for (uint32_t i = 0; i < n_log[lane]; i++) {
      const Entry& e = logs[lane][i];
      uint32_t h = e.pc * 2654435761u >> 20;
      while (pcs[h] && pcs[h] != e.pc) h = (h + 1) & (SLOTS - 1);
      if (!pcs[h]) pcs[h] = e.pc, counts[h] = 0;
      all[n++] = {e.pc, counts[h]++, &e};
    }
  }
  qsort(all, n, sizeof *all, by_occurrence);
  for (uint32_t i = 0, j; i < n; i = j) {
    const Entry* group[32];
    for (j = i; j < n && j - i < 32 && all[j].pc == all[i].pc; j++) {
      if (all[j].occurrence != all[i].occurrence) break;
      group[j - i] = all[j].entry;
    }
    count_lines(l, group, j - i);
  }
  free(all);
}

static void count_simdgroup(Worker* w) {
  msl_launch* l = w->launch;
  uint32_t n_lanes = w->s.n_lanes, n = n_log[0], total = 0;
  bool same = true;
  for (uint32_t lane = 0; lane < n_lanes; lane++) {
    total += n_log[lane];
    same &= n_log[lane] == n;
  }
  for (uint32_t i = 0; same && i < n; i++) {
    for (uint32_t lane = 1; lane < n_lanes; lane++) same &= logs[lane][i].pc == logs[0][i].pc;
  }
  if (same) {
    for (uint32_t i = 0; i < n; i++) {
      const Entry* group[32];
      for (uint32_t lane = 0; lane < n_lanes; lane++) group[lane] = &logs[lane][i];
      count_lines(l, group, n_lanes);
    }
  } else if (total) {
    count_diverged(l, n_lanes, total);
  }
  memset(n_log, 0, sizeof n_log);
}

void check_round(Worker* w) { count_simdgroup(w); }

// ---- findings -------------------------------------------------------------------------------------

// One report per kind, place and buffer; more of the same are counted.
static msl_report* find(Worker* w, uint32_t kind, uint32_t pc, int32_t buffer, bool write) {
  msl_launch* l = w->launch;
  for (uint32_t i = 0; i < l->n_reports; i++) {
    msl_report& r = l->reports[i];
    if (r.kind == kind && r.pc == pc && r.buffer == buffer && r.access == write) {
      r.count++;
      return nullptr;
    }
  }
  msl_report* r = add_report(w, kind, 0);
  r->pc = pc, r->buffer = buffer, r->access = write;
  return r;
}

struct Access {
  Worker* w;
  uint32_t pc, thread, size;
  int32_t buffer;
  int64_t offset;
  bool write, atomic;
};

static void report_race(const Access& a, const Cell& c, uint32_t kind, bool with_write, uint32_t byte) {
  msl_report* r = find(a.w, kind, a.pc, a.buffer, a.write);
  if (!r) return;
  r->offset = a.offset + byte, r->size = a.size;
  r->other_thread = (with_write ? c.w_thread : c.r_thread) & THREAD;
  r->other_pc = with_write ? c.w_pc : c.r_pc;
  strcpy(r->text, with_write ? "write" : "read");
}

// Whether the earlier access, by `flags` in simdgroup epoch `simd`, is ordered before this one.
static bool ordered(const Access& a, uint16_t flags, uint16_t simd, uint16_t now) {
  uint32_t thread = flags & THREAD;
  if (a.atomic && (flags & ATOMIC)) return true;
  if (flags & MANY_GROUPS) return false;
  if (thread == a.thread && !(flags & MANY_LANES)) return true;
  return thread / 32 == a.thread / 32 && (int16_t)(now - simd) > 0;
}

static void check_byte(const Access& a, Cell& c, int space, uint32_t byte) {
  Worker* w = a.w;
  uint32_t now = w->epoch[space], first = w->first_epoch;
  uint16_t simd = w->simd_epoch[space][a.thread / 32];
  bool in_group = space == GROUP_EPOCH;
  uint32_t w_epoch = in_group && c.w_epoch < first ? 0 : c.w_epoch;
  uint32_t r_epoch = in_group && c.r_epoch < first ? 0 : c.r_epoch;
  if (w_epoch == 0) {
    msl_report* r = a.write ? nullptr : find(w, UNINITIALISED, a.pc, a.buffer, false);
    if (r) r->offset = a.offset + byte, r->size = a.size;
  } else if (w_epoch != HOST && w_epoch < first) {
    if (!(a.atomic && (c.w_thread & ATOMIC))) report_race(a, c, RACE_BETWEEN_GROUPS, true, byte);
  } else if (w_epoch == now && !ordered(a, c.w_thread, c.w_simd, simd)) {
    report_race(a, c, RACE, true, byte);
  }
  uint16_t me = a.thread | (a.atomic ? ATOMIC : 0);
  if (a.write) {
    if (r_epoch && r_epoch < first) {
      if (!(a.atomic && (c.r_thread & ATOMIC))) report_race(a, c, RACE_BETWEEN_GROUPS, false, byte);
    } else if (r_epoch == now && !ordered(a, c.r_thread, c.r_simd, simd)) {
      report_race(a, c, RACE, false, byte);
    }
    c.w_epoch = now, c.w_pc = a.pc, c.w_thread = me, c.w_simd = simd;
    return;
  }
  if (r_epoch == now) {
    bool near = (c.r_thread & THREAD) / 32 == a.thread / 32 && !(c.r_thread & MANY_GROUPS);
    bool same = (c.r_thread & (THREAD | MANY_LANES)) == a.thread;
    me = a.thread | (me & c.r_thread & ATOMIC);
    if (!near) {
      me |= MANY_GROUPS;
    } else if (!same && simd == c.r_simd) {
      me |= MANY_LANES; // reads before the simdgroup's last barrier are behind all that follows
    }
  }
  c.r_epoch = now, c.r_pc = a.pc, c.r_thread = me, c.r_simd = simd;
}

static void check_cells(const Access& a, Cell* cells, int space) {
  for (uint32_t i = 0; i < a.size; i++) check_byte(a, cells[i], space, i);
}

[[noreturn]] static void out_of_bounds(const Access& a) {
  msl_report* r = add_report(a.w, OUT_OF_BOUNDS, 0);
  r->pc = a.pc, r->buffer = a.buffer, r->access = a.write, r->size = a.size, r->offset = a.offset;
  stop(a.w);
}

static void check_arena(Access a, uint64_t at) {
  uint32_t owner = arena_owner[at >> 6];
  for (uint64_t k = at >> 6; !owner && k > 0; k--) owner = arena_owner[k];
  if (!owner) owner = arena_owner[4];  // before the first array
  if (!owner) return;
  const Array& array = a.w->arrays[owner - 1];
  a.buffer = -(int32_t)owner;
  a.offset = (int64_t)at - array.offset;
  if (a.offset < 0 || a.offset + a.size > array.size) out_of_bounds(a);
  check_cells(a, arena_cells + at, GROUP_EPOCH);
}

static int32_t buffer_at(msl_launch* l, uint64_t address) {
  for (uint32_t k = 0; k < l->n_buffers; k++) {
    uint32_t i = (last_buffer + k) % l->n_buffers;
    int64_t offset = address - (uint64_t)l->buffers[i].base;
    if (offset >= -NEAR && offset < (int64_t)l->buffers[i].size + NEAR) return last_buffer = i;
  }
  return -1;
}

static void check_access(const void* pointer, uint32_t size, bool write, bool atomic, const void* ra) {
  Worker* w = worker();
  uint64_t address = (uint64_t)pointer, at = address - (uint64_t)w->arena;
  Access a = {w, (uint32_t)((uint64_t)ra - 1 - library), thread_index(), size, 0, 0, write, atomic};
  if (at < ARENA_BYTES) {
    check_arena(a, at);
    return;
  }
  if (worker_of(pointer) == w) return; // the lane's own stack, or the slots lanes exchange
  a.buffer = buffer_at(w->launch, address);
  if (a.buffer < 0) return;            // a table of constants; anything else faults
  msl_buffer& b = w->launch->buffers[a.buffer];
  a.offset = address - (uint64_t)b.base;
  if (a.offset < 0 || a.offset + size > b.size) out_of_bounds(a);
  (write ? b.stored : b.loaded) += size;
  Shadow& shadow = shadows[a.buffer];
  memset(shadow.seen + a.offset, 1, size);
  log_bytes(a.thread & 31, a.pc, a.buffer, a.offset, size, write);
  if (shadow.cells) {
    check_cells(a, shadow.cells + a.offset, DEVICE_EPOCH);
  } else if (write) {
    msl_report* r = find(w, WROTE_INPUT, a.pc, a.buffer, true);
    if (r) r->offset = a.offset, r->size = size;
  }
}

// ---- begin and end --------------------------------------------------------------------------------

void check_begin(msl_launch* l) {
  Dl_info info;
  library = dladdr((void*)l->entry, &info) ? (uint64_t)info.dli_fbase : 0;
  last_buffer = 0;
  memset(n_log, 0, sizeof n_log);
  for (uint32_t i = 0; i < l->n_buffers; i++) {
    msl_buffer& b = l->buffers[i];
    b.loaded = b.stored = b.useful = b.lines = b.touched = 0;
    shadows[i].seen = (uint8_t*)calloc(b.size + 1, 1);
    shadows[i].cells = b.is_output ? (Cell*)calloc(b.size + 1, sizeof(Cell)) : nullptr;
    for (uint64_t k = 0; b.is_output && b.copy_in && k < b.size; k++) shadows[i].cells[k].w_epoch = HOST;
  }
}

void check_group(Worker* w) {
  memset(arena_owner, 0, sizeof arena_owner);
  memset(w->simd_epoch, 0, sizeof w->simd_epoch);
}

void check_array(Worker* w, uint32_t id) {
  const Array& a = w->arrays[id];
  for (uint32_t k = a.offset >> 6; k <= (a.offset + a.size - 1) >> 6; k++) arena_owner[k] = id + 1;
}

// complete: every threadgroup ran; one that stopped is not to blame for what it did not write.
void check_end(msl_launch* l, bool complete) {
  for (uint32_t i = 0; i < l->n_buffers; i++) {
    msl_buffer& b = l->buffers[i];
    Shadow& s = shadows[i];
    uint64_t missing = 0, first = 0;
    for (uint64_t k = 0; k < b.size; k++) {
      b.touched += s.seen[k];
      if (s.cells && !s.cells[k].w_epoch && !missing++) first = k;
    }
    if (missing && complete && l->n_reports < MAX_REPORTS) {
      msl_report* r = &l->reports[l->n_reports++];
      memset(r, 0, sizeof *r);
      r->kind = NEVER_WRITTEN, r->buffer = i, r->offset = first, r->size = missing, r->count = 1;
    }
    free(s.seen), free(s.cells);
  }
}

// ---- what the instrumentation calls ---------------------------------------------------------------

#define HERE __builtin_return_address(0)
extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
#define ACCESSES(n)                                                                     \
  void __tsan_read##n(void* p) { check_access(p, n, false, false, HERE); }              \
  void __tsan_write##n(void* p) { check_access(p, n, true, false, HERE); }              \
  void __tsan_unaligned_read##n(void* p) { check_access(p, n, false, false, HERE); }    \
  void __tsan_unaligned_write##n(void* p) { check_access(p, n, true, false, HERE); }
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)

static void check_range(const void* p, uint64_t size, bool write, const void* ra) {
  for (uint64_t i = 0; i < size; i += 16) {
    check_access((const uint8_t*)p + i, size - i < 16 ? size - i : 16, write, false, ra);
  }
}
void* __tsan_memcpy(void* d, const void* s, uint64_t n) {
  check_range(s, n, false, HERE), check_range(d, n, true, HERE);
  return memcpy(d, s, n);
}
void* __tsan_memmove(void* d, const void* s, uint64_t n) {
  check_range(s, n, false, HERE), check_range(d, n, true, HERE);
  return memmove(d, s, n);
}
void* __tsan_memset(void* d, int v, uint64_t n) {
  check_range(d, n, true, HERE);
  return memset(d, v, n);
}
#define ATOMICS(bits, T)                                                                          \
  T __tsan_atomic##bits##_load(const volatile T* p, int) {                                        \
    check_access((const void*)p, sizeof(T), false, true, HERE);                                   \
    return __atomic_load_n(p, __ATOMIC_RELAXED);                                                  \
  }                                                                                               \
  void __tsan_atomic##bits##_store(volatile T* p, T v, int) {                                     \
    check_access((const void*)p, sizeof(T), true, true, HERE);                                    \
    __atomic_store_n(p, v, __ATOMIC_RELAXED);                                                     \
  }                                                                                               \
  T __tsan_atomic##bits##_compare_exchange_val(volatile T* p, T was, T v, int, int) {             \
    check_access((const void*)p, sizeof(T), true, true, HERE);                                    \
    __atomic_compare_exchange_n(p, &was, v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);           \
    return was;                                                                                   \
  }
ATOMICS(32, uint32_t)
ATOMICS(64, uint64_t)

// UndefinedBehaviorSanitizer: a place, and the types involved.
struct Place { const char* file; uint32_t line, column; };
struct Type { uint16_t kind, info; char name[1]; };
static msl_report* undefined(const Place& place, uint32_t kind) {
  msl_report* r = add_report(worker(), kind, place.line);
  r->size = place.column;
  if (strcmp(place.file, "kernel")) r->line = 0; // in the shader header: the caller's line is unknown
  return r;
}
struct IndexData { Place place; const Type *array, *index; };
void __ubsan_handle_out_of_bounds_abort(IndexData* d, uint64_t index) {
  msl_report* r = undefined(d->place, BAD_INDEX);
  r->pc = (uint64_t)HERE - 1 - library, r->offset = (int64_t)index;
  strncpy(r->text, d->array->name, 95);
  stop(worker());
}
void __ubsan_handle_local_out_of_bounds_abort() {
  msl_report* r = add_report(worker(), BAD_INDEX, 0);
  r->pc = (uint64_t)HERE - 1 - library;
  stop(worker());
}
struct TypeData { Place place; const Type* type; };
void __ubsan_handle_divrem_overflow_abort(TypeData* d, uint64_t, uint64_t) {
  strcpy(undefined(d->place, ARITHMETIC)->text, "division by zero, or a quotient out of range");
  stop(worker());
}
struct CastData { Place place; const Type *from, *to; };
void __ubsan_handle_float_cast_overflow_abort(CastData* d, uint64_t) {
  msl_report* r = undefined(d->place, OUT_OF_RANGE);
  r->pc = (uint64_t)HERE - 1 - library;
  strncpy(r->text, d->to->name, 95);
  stop(worker());
}
struct MismatchData { Place place; const Type* type; uint8_t log_align, kind; };
void __ubsan_handle_type_mismatch_v1_abort(MismatchData* d, uint64_t address) {
  msl_report* r = undefined(d->place, MISALIGNED);
  r->pc = (uint64_t)HERE - 1 - library, r->offset = address & 255;
  strncpy(r->text, d->type->name, 95);
  stop(worker());
}
}
