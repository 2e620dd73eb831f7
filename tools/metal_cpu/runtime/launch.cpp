// One launch: guarded copies of the buffers, the workers, and faults turned into reports.
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "runtime.h"
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <dlfcn.h>
#include <sys/mman.h>
#include <sys/ucontext.h>
#include <unistd.h>

extern "C" void msl_resume();
void prepare_worker(Worker* w, msl_launch* l, const uint64_t* bases, uint32_t number);
void run_worker(Worker* w, uint64_t n_groups, uint64_t n_all, uint64_t* counter, uint32_t* failed);

enum { MAX_WORKERS = 16 };
static const size_t GUARD = 1 << 20;
static Worker* workers[MAX_WORKERS];
static uint32_t stacks[MAX_WORKERS];      // fibers whose guard page is in place
static size_t page;

// ---- guarded buffers ------------------------------------------------------------------------

// A region of 2^k pages between two guards. A buffer lies at its end, so that the first byte past
// the buffer is in a guard (up to the 16-byte alignment of the buffer's start).
struct Region {
  uint8_t* pages;
  uint32_t k;
};
static Region* free_regions[40];
static uint32_t n_free[40];

static Region take_region(size_t size) {
  uint32_t k = 0;
  while ((page << k) < size) k++;
  if (n_free[k]) return free_regions[k][--n_free[k]];
  size_t bytes = page << k;
  uint8_t* p = (uint8_t*)mmap(0, bytes + 2 * GUARD, PROT_NONE,
                              MAP_PRIVATE | MAP_ANON | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED || mprotect(p + GUARD, bytes, PROT_READ | PROT_WRITE)) abort();
  return {p + GUARD, k};
}

static void give_region(Region r) {
  if (r.k > 13 || n_free[r.k] >= 64) { // more than 32 MiB, or enough of this size
    munmap(r.pages - GUARD, (page << r.k) + 2 * GUARD);
    return;
  }
  if (!free_regions[r.k]) free_regions[r.k] = (Region*)malloc(64 * sizeof(Region));
  free_regions[r.k][n_free[r.k]++] = r;
}

static uint8_t garbage(uint64_t seed) { return seed ? (uint8_t)(seed * 0x9d | 0x81) : 0xff; }

static void fill_buffer(msl_buffer& b, Region r, uint64_t seed) {
  uint8_t* end = r.pages + (page << r.k);
  b.base = (uint8_t*)((uintptr_t)(end - b.size) & ~15ul);
  if (b.copy_in) {
    memcpy(b.base, b.host, b.size);
  } else {
    memset(b.base, garbage(seed), b.size);
  }
  memset(b.base + b.size, 0xa5, end - b.base - b.size);
}

// Bytes between the end of the buffer and its guard must be as they were.
static int64_t written_past_end(const msl_buffer& b, Region r) {
  uint8_t* end = r.pages + (page << r.k);
  for (uint8_t* p = b.base + b.size; p < end; p++) {
    if (*p != 0xa5) return p - b.base;
  }
  return -1;
}

// ---- faults -----------------------------------------------------------------------------------

static const int SIGNALS[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP};
static struct sigaction previous[5];

#if defined(__APPLE__) && defined(__aarch64__)
#define CONTEXT_SP(u) ((u)->uc_mcontext->__ss.__sp)
#define CONTEXT_PC(u) ((u)->uc_mcontext->__ss.__pc)
#elif defined(__APPLE__)
#define CONTEXT_SP(u) ((u)->uc_mcontext->__ss.__rsp)
#define CONTEXT_PC(u) ((u)->uc_mcontext->__ss.__rip)
#elif defined(__aarch64__)
#define CONTEXT_SP(u) ((u)->uc_mcontext.sp)
#define CONTEXT_PC(u) ((u)->uc_mcontext.pc)
#else
#define CONTEXT_SP(u) ((u)->uc_mcontext.gregs[REG_RSP])
#define CONTEXT_PC(u) ((u)->uc_mcontext.gregs[REG_RIP])
#endif

uint64_t library_offset(const void* pc) {
  Dl_info info;
  return dladdr(pc, &info) ? (uint64_t)pc - (uint64_t)info.dli_fbase : 0;
}

// The buffer whose pages or guards hold the address.
static int buffer_near(msl_launch* l, uint8_t* address) {
  for (uint32_t i = 0; i < l->n_buffers; i++) {
    msl_buffer& b = l->buffers[i];
    if (address >= b.base - GUARD && address < b.base + b.size + GUARD) return i;
  }
  return MAX_BUFFERS;
}

static bool is_write(ucontext_t* u) {
#if defined(__x86_64__) && !defined(__APPLE__)
  return u->uc_mcontext.gregs[REG_ERR] & 2;
#else
  (void)u;
  return false;
#endif
}

static Worker* worker_with_stack(uint64_t sp) {
  for (Worker* w : workers) {
    if (w && worker_of((void*)sp) == w && w->launch) return w;
  }
  return nullptr;
}

static void on_fault(int signal, siginfo_t* info, void* context) {
  ucontext_t* u = (ucontext_t*)context;
  uint64_t sp = CONTEXT_SP(u);
  Worker* w = worker_with_stack(sp);
  if (!w) { // not ours: what was installed before decides
    for (int i = 0; i < 5; i++) {
      if (SIGNALS[i] == signal) sigaction(signal, &previous[i], nullptr);
    }
    return;
  }
  uint8_t* address = (uint8_t*)info->si_addr;
  bool in_worker = worker_of(address) == w;
  bool memory = signal == SIGSEGV || signal == SIGBUS;
  int buffer = memory ? buffer_near(w->launch, address) : MAX_BUFFERS;
  uint32_t kind = !memory ? ARITHMETIC : in_worker ? STACK_OVERFLOW
                  : buffer < MAX_BUFFERS ? OUT_OF_BOUNDS : WILD_ACCESS;
  msl_report* r = add_report(w, kind, 0);
  r->thread = (sp >> MSL_STACK_BITS) & (MSL_MAX_THREADS - 1);
  r->pc = library_offset((void*)CONTEXT_PC(u));
  r->access = is_write(u) ? WRITE : READ;
  r->buffer = buffer;
  r->offset = buffer < MAX_BUFFERS ? address - w->launch->buffers[buffer].base : (int64_t)address;
  w->failed = 1;
  CONTEXT_SP(u) = (uint64_t)w->main_sp;
  CONTEXT_PC(u) = (uint64_t)msl_resume;
}

static void install_handlers() {
  struct sigaction a, old;
  memset(&a, 0, sizeof a);
  a.sa_sigaction = on_fault;
  a.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  sigemptyset(&a.sa_mask);
  for (int i = 0; i < 5; i++) {
    sigaction(SIGNALS[i], &a, &old);
    if (!(old.sa_flags & SA_SIGINFO) || old.sa_sigaction != on_fault) previous[i] = old;
  }
}

// ---- workers ----------------------------------------------------------------------------------

static Worker* make_worker() {
  size_t size = 1ul << MSL_WORKER_BITS;
  uint8_t* p = (uint8_t*)mmap(0, 2 * size, PROT_NONE, MAP_PRIVATE | MAP_ANON | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) abort();
  Worker* w = (Worker*)(((uintptr_t)p + size - 1) & ~(size - 1));
  size_t first = (sizeof(Worker) + page - 1) & ~(page - 1);
  if (mprotect(w, first, PROT_READ | PROT_WRITE)) abort();
  w->arena = (uint8_t*)w + (1 << 26);
  if (mprotect(w->arena, ARENA_BYTES, PROT_READ | PROT_WRITE)) abort();
  w->signal_stack = malloc(1 << 16);
  w->epoch[0] = w->epoch[1] = 1; // what the host wrote before the launch has this one
  return w;
}

static void make_stacks(uint32_t number, uint32_t n) {
  uint8_t* base = (uint8_t*)workers[number] + MSL_STACK0;
  for (uint32_t& i = stacks[number]; i < n; i++) {
    uint8_t* stack = base + ((size_t)i << MSL_STACK_BITS);
    size_t size = (1ul << MSL_STACK_BITS) - MSL_STACK_GUARD;
    if (mprotect(stack + MSL_STACK_GUARD, size, PROT_READ | PROT_WRITE)) abort();
  }
}

struct Work {
  msl_launch* launch;
  const uint64_t* bases;
  uint64_t n_groups, n_all, counter;
  uint32_t failed, busy, wanted, generation;
};
static Work work;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t start = PTHREAD_COND_INITIALIZER, finished = PTHREAD_COND_INITIALIZER;
static uint32_t n_threads = 1; // the caller is worker 0

static void work_as(uint32_t number) {
  Worker* w = workers[number];
  stack_t own = {}, old;
  own.ss_sp = w->signal_stack, own.ss_size = 1 << 16;
  sigaltstack(&own, &old);
  prepare_worker(w, work.launch, work.bases, number);
  run_worker(w, work.n_groups, work.n_all, &work.counter, &work.failed);
  w->launch = nullptr;
  sigaltstack(&old, nullptr);
}

static void* worker_thread(void* argument) {
  uint32_t number = (uint32_t)(uintptr_t)argument, seen = 0;
  pthread_mutex_lock(&mutex);
  for (;;) {
    while (work.generation == seen || number >= work.wanted) {
      seen = work.generation;
      pthread_cond_wait(&start, &mutex);
    }
    seen = work.generation;
    pthread_mutex_unlock(&mutex);
    work_as(number);
    pthread_mutex_lock(&mutex);
    if (--work.busy == 0) pthread_cond_signal(&finished);
  }
  return nullptr;
}

static void run_on_workers(uint32_t n, uint32_t group_threads) {
  for (uint32_t i = 0; i < n; i++) {
    if (!workers[i]) workers[i] = make_worker();
    make_stacks(i, group_threads);
  }
  for (; n_threads < n; n_threads++) {
    pthread_t t;
    if (pthread_create(&t, nullptr, worker_thread, (void*)(uintptr_t)n_threads)) abort();
    pthread_detach(t);
  }
  if (n > 1) {
    pthread_mutex_lock(&mutex);
    work.wanted = n, work.busy = n - 1, work.generation++;
    pthread_cond_broadcast(&start);
    pthread_mutex_unlock(&mutex);
  }
  work_as(0);
  if (n > 1) {
    pthread_mutex_lock(&mutex);
    while (work.busy) pthread_cond_wait(&finished, &mutex);
    work.wanted = 0;
    pthread_mutex_unlock(&mutex);
  }
}

// ---- the entry from Python --------------------------------------------------------------------

static pthread_mutex_t one_launch = PTHREAD_MUTEX_INITIALIZER;

static void after_fork() {
  n_threads = 1;
  pthread_mutex_init(&mutex, nullptr);
  pthread_mutex_init(&one_launch, nullptr);
}

// Runs a launch. Its reports and counters are filled in; outputs are copied to their hosts.
extern "C" void msl_run(msl_launch* l) {
  pthread_mutex_lock(&one_launch);
  if (!page) {
    page = sysconf(_SC_PAGESIZE);
    pthread_atfork(nullptr, nullptr, after_fork);
  }
  Region regions[MAX_BUFFERS];
  uint64_t bases[MAX_BUFFERS];
  for (uint32_t i = 0; i < l->n_buffers; i++) {
    regions[i] = take_region(l->buffers[i].size + 16);
    fill_buffer(l->buffers[i], regions[i], l->seed);
    bases[i] = (uint64_t)l->buffers[i].base;
  }
  uint64_t n_all = 1;
  for (int i = 0; i < 3; i++) n_all *= (l->grid[i] + l->group[i] - 1) / l->group[i];
  uint64_t n_groups = l->n_sampled && l->n_sampled < n_all ? l->n_sampled : n_all;
  uint32_t n = l->n_workers < n_groups ? l->n_workers : (uint32_t)n_groups;
  if (n > MAX_WORKERS) n = MAX_WORKERS;
  l->n_reports = 0;
  memset(l->array_sizes, 0, sizeof l->array_sizes);
  install_handlers();
  work.launch = l, work.bases = bases, work.n_groups = n_groups, work.n_all = n_all;
  work.counter = 0, work.failed = 0;
  if (l->check) check_begin(l);
  run_on_workers(l->check || n < 1 ? 1 : n, l->group[0] * l->group[1] * l->group[2]);
  if (l->check) check_end(l, !work.failed && n_groups == n_all);
  for (uint32_t i = 0; i < l->n_buffers; i++) {
    msl_buffer& b = l->buffers[i];
    int64_t past = written_past_end(b, regions[i]);
    if (past >= 0 && l->n_reports < MAX_REPORTS) {
      msl_report* r = &l->reports[l->n_reports++];
      memset(r, 0, sizeof *r);
      r->kind = PAST_END, r->access = WRITE, r->buffer = i, r->offset = past, r->count = 1;
    }
    if (b.is_output) memcpy(b.host, b.base, b.size);
    give_region(regions[i]);
  }
  pthread_mutex_unlock(&one_launch);
}
