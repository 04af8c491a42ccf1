// Runs CUDA C++ kernels on a CPU, one block at a time, for tests: each thread is a fiber that runs until it meets a barrier or a
// shuffle. A warp's shuffles are exchanged as soon as its 32 threads have met; a block's barrier opens when all its threads
// wait there. Threads that part ways at either abort the program, which on a GPU would hang or return rubbish.
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline __attribute__((always_inline))
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)

struct Index {
  int x, y, z;
};
static Index threadIdx, blockIdx, blockDim, gridDim;
static char* dynamic_memory;
using std::min;

template <class T> static T __ldg(const T* pointer) { return *pointer; }
static float __uint_as_float(unsigned bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

namespace emulator {
enum Wait { RUNNING, BARRIER, SENT, RECEIVED };
struct Fiber {
  ucontext_t context;
  char* stack;
  bool done;
  Wait wait;
};
const int STACK_BYTES = 1 << 17;
typedef void (*Kernel)(const void*);
static std::vector<Fiber> fibers;
static std::vector<float> slots;
static ucontext_t scheduler;
static int current;
static Kernel kernel;
static const void* arguments;

static void stop(Wait wait) {
  fibers[current].wait = wait;
  swapcontext(&fibers[current].context, &scheduler);
}
static void entry() {
  kernel(arguments);
  fibers[current].done = true;
  swapcontext(&fibers[current].context, &scheduler);
}
static void resume(int thread) {
  current = threadIdx.x = thread;
  fibers[thread].wait = RUNNING;
  swapcontext(&scheduler, &fibers[thread].context);
}
static void run_warp(int warp) {  // to the next barrier or the end
  for (bool first = true;; first = false) {
    for (int t = 32 * warp; t < 32 * warp + 32; t++)
      if (!fibers[t].done && (first || fibers[t].wait > BARRIER)) resume(t);
    int shuffling = 0;
    for (int t = 32 * warp; t < 32 * warp + 32; t++) shuffling += !fibers[t].done && fibers[t].wait > BARRIER;
    if (shuffling == 0) return;
    if (shuffling != 32) fprintf(stderr, "%d of 32 threads met at a shuffle\n", shuffling), abort();
  }
}
static void run_block(int threads) {
  fibers.resize(threads);
  slots.resize(threads);
  for (Fiber& fiber : fibers) {
    if (!fiber.stack) fiber.stack = (char*)malloc(STACK_BYTES);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = STACK_BYTES;
    fiber.done = false;
    makecontext(&fiber.context, entry, 0);
  }
  while (true) {
    for (int warp = 0; warp < threads / 32; warp++) run_warp(warp);
    const int done = std::count_if(fibers.begin(), fibers.end(), [](const Fiber& f) { return f.done; });
    if (done == threads) return;
    if (done != 0) fprintf(stderr, "%d of %d threads missed a barrier\n", done, threads), abort();
  }
}
static void launch(Kernel function, const void* args, Index grid, int threads, int shared_bytes) {
  kernel = function;
  arguments = args;
  blockDim = {threads, 1, 1};
  gridDim = grid;
  dynamic_memory = (char*)aligned_alloc(64, shared_bytes / 64 * 64 + 64);
  for (int z = 0; z < grid.z; z++)
    for (int y = 0; y < grid.y; y++)
      for (int x = 0; x < grid.x; x++) {
        memset(dynamic_memory, 0xff, shared_bytes);  // NaN
        blockIdx = {x, y, z};
        run_block(threads);
      }
  free(dynamic_memory);
}
}  // namespace emulator

static void __syncthreads() { emulator::stop(emulator::BARRIER); }
static float __shfl_xor_sync(unsigned, float value, int mask) {
  const int here = threadIdx.x;
  emulator::slots[here] = value;
  emulator::stop(emulator::SENT);
  const float other = emulator::slots[here ^ mask];
  emulator::stop(emulator::RECEIVED);
  return other;
}
