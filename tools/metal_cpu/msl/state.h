// What the shader header and the runtime share: where a lane's state lies and how lanes meet.
//
// Every thread of a threadgroup is a fiber on its own stack. The stacks of one worker lie in one
// block of memory aligned to its size, and the worker's state lies at the start of that block, so
// a lane finds both its number and its worker's state by masking its stack pointer: no thread-local
// storage, no argument handed through the shader.
#pragma once

#define MSL_STACK_BITS 17           // 128 KiB per fiber ...
#define MSL_STACK_GUARD (32 * 1024) // ... the lowest 32 KiB of which are a guard
#define MSL_WORKER_BITS 28          // 256 MiB of addresses per worker: its state, then 1024 stacks
#define MSL_STACK0 (1ul << 27)      // offset of the first stack in the worker's block
#define MSL_MAX_THREADS 1024        // threads in a threadgroup: Metal's limit
#define MSL_TG_BYTES 32768          // threadgroup memory: Metal's limit
#define MSL_MAX_ARRAYS 64           // threadgroup declarations in one kernel

enum { MSL_RUN, MSL_EXIT, MSL_BARRIER, MSL_SIMD_BARRIER, MSL_SIMD_OP };

struct msl_state {
  unsigned pos, n_round;            // lane of the round that runs; lanes in the round
  unsigned sg, n_lanes;             // simdgroup that runs; lanes it has (fewer in the last one)
  unsigned parity;                  // which of the two sets of slots this round uses
  unsigned check;                   // 1 in check mode
  unsigned n_threads, n_simdgroups;
  // Values that lanes show each other. Two sets: a lane may write for the next operation while
  // another has not read what was written for this one.
  unsigned char slot[2][32][16] __attribute__((aligned(64)));
  unsigned char result[2][16] __attribute__((aligned(64)));
  float mat[2][4][64] __attribute__((aligned(64)));
};

struct msl_ids {
  unsigned position_in_threadgroup[3], position_in_grid[3], threadgroup_position[3];
  unsigned threads_per_threadgroup[3], dispatch_threads[3], threadgroups_per_grid[3];
  unsigned threads_per_grid[3];
  unsigned index, n_threads, n_dispatch;
};
