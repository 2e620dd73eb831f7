// The runtime's own structures. launch.py mirrors msl_buffer, msl_report and msl_launch.
#pragma once
#include "../msl/state.h"
#include <stddef.h>
#include <stdint.h>

enum Kind : uint32_t {
  OUT_OF_BOUNDS = 1, WILD_ACCESS, STACK_OVERFLOW, ARITHMETIC, DIVERGENT, TOO_MUCH_THREADGROUP_MEMORY,
  FAILED_CHECK, PAST_END, RACE, RACE_BETWEEN_GROUPS, UNINITIALISED, WROTE_INPUT, NEVER_WRITTEN, BAD_INDEX,
  MISALIGNED, OUT_OF_RANGE
};
enum { READ = 0, WRITE = 1 };
enum { MAX_REPORTS = 64, MAX_BUFFERS = 48 };

struct msl_buffer {
  void* host;           // caller's memory
  uint64_t size;        // bytes
  uint32_t is_output;   // 1: copied back after the launch
  uint32_t copy_in;     // 0: starts as garbage that depends on the seed
  uint8_t* base;        // where the kernel saw it
  uint64_t loaded, stored;                 // bytes, summed over lanes
  uint64_t useful, lines;                  // per simdgroup access: distinct bytes, 128-byte lines
  uint64_t touched;                        // distinct bytes of the whole launch
};

struct msl_report {
  uint32_t kind, access;       // access: READ or WRITE
  uint32_t line, other_line;   // lines of the source where the runtime knows them, else 0
  uint64_t pc, other_pc;       // offsets in the kernel's library, else 0
  int32_t buffer;              // index of the device buffer, or -1 - index of the threadgroup array
  uint32_t size;
  int64_t offset;              // bytes from the start of the buffer or array
  uint32_t group[3], thread, other_thread, count;
  char text[96];
};

struct msl_launch {
  void (*entry)(const uint64_t* buffers, const msl_ids* ids);
  msl_buffer* buffers;
  uint32_t n_buffers, check;
  uint32_t grid[3], group[3];
  uint64_t seed;
  uint32_t n_workers, n_reports;
  uint64_t n_sampled;          // run so many threadgroups, spread over the grid; 0: all
  msl_report reports[MAX_REPORTS];
  char arrays[MSL_MAX_ARRAYS][32];  // names of the threadgroup arrays
  uint32_t array_sizes[MSL_MAX_ARRAYS];
};

struct Array {                 // one threadgroup array of the threadgroup that runs
  uint32_t offset, size, line, seen;
};

struct Worker {
  msl_state s;                 // first: lanes find it by masking their stack pointer
  void* sp[MSL_MAX_THREADS];
  uint32_t site[MSL_MAX_THREADS];          // op << 24 | line, of the last arrival
  const char* name[MSL_MAX_THREADS];
  void* main_sp;
  msl_launch* launch;
  uint64_t bases[MAX_BUFFERS];             // here, where check mode expects no buffer
  msl_ids ids;
  const uint8_t* order;        // lanes of this round
  uint8_t partial[32], groups[32];
  uint32_t group_pos, perm, done, failed, group_number;
  uint64_t random, perm_seed;
  uint8_t perms[64][32];
  // The order of memory within a threadgroup: epochs only grow.
  uint32_t epoch[2], first_epoch, simd_epoch[2][32];
  Array arrays[MSL_MAX_ARRAYS];
  uint32_t array_end, n_arrays;
  void* signal_stack;
  uint8_t* arena;              // threadgroup memory
};

enum { DEVICE_EPOCH = 0, GROUP_EPOCH = 1 };
enum { ARENA_BYTES = 1 << 17 };

static inline Worker* worker_of(const void* sp) {
  return (Worker*)((uintptr_t)sp & ~((1ul << MSL_WORKER_BITS) - 1));
}
static inline Worker* worker() { return worker_of(__builtin_frame_address(0)); }
static inline uint32_t thread_index() {
  return ((uintptr_t)__builtin_frame_address(0) >> MSL_STACK_BITS) & (MSL_MAX_THREADS - 1);
}

msl_report* add_report(Worker* w, uint32_t kind, uint32_t line);
[[noreturn]] void stop(Worker* w);
// check.cpp
void check_begin(msl_launch* launch);
void check_end(msl_launch* launch, bool complete);
void check_group(Worker* w);
void check_round(Worker* w);
void check_array(Worker* w, uint32_t id);
