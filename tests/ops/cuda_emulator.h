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

struct alignas(8) float2 {
  float x, y;
};
static float2 make_float2(float x, float y) { return {x, y}; }

template <class T> static T __ldg(const T* pointer) { return *pointer; }
static float __uint_as_float(unsigned bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

static unsigned __float_as_uint(float value) {
  unsigned bits;
  memcpy(&bits, &value, 4);
  return bits;
}

static unsigned short narrow_bf16(float value) {
  const unsigned bits = __float_as_uint(value);
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
static unsigned short narrow_f16(float value) {
  const _Float16 half = (_Float16)value;
  unsigned short bits;
  memcpy(&bits, &half, 2);
  return bits;
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
  slots.resize(6 * threads);
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

// mma.sync.m16n8k8 of tf32: every lane deposits its part of A and B and picks up what its part of D takes.
static void mma(float (&d)[4], float a0, float a1, float a2, float a3, float b0, float b1) {
  const int here = threadIdx.x, warp = here / 32 * 32, group = here % 32 / 4, place = here % 4;
  const float own[6] = {a0, a1, a2, a3, b0, b1};
  for (int k = 0; k < 6; k++) emulator::slots[6 * here + k] = __uint_as_float(__float_as_uint(own[k]) & 0xffffe000u);
  emulator::stop(emulator::SENT);
  for (int row = 0; row < 2; row++)
    for (int column = 0; column < 2; column++)
      for (int k = 0; k < 8; k++) {
        const float a = emulator::slots[6 * (warp + 4 * group + k % 4) + row + k / 4 * 2];
        const float b = emulator::slots[6 * (warp + 4 * (2 * place + column) + k % 4) + 4 + k / 4];
        d[2 * row + column] += a * b;
      }
  emulator::stop(emulator::RECEIVED);
}

// mma.sync.m16n8k16 of bfloat16: the same with two elements in each word.
static void mma_bf16(float (&d)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  const int here = threadIdx.x, warp = here / 32 * 32, group = here % 32 / 4, place = here % 4;
  const unsigned own[6] = {a0, a1, a2, a3, b0, b1};
  memcpy(&emulator::slots[6 * here], own, sizeof own);
  emulator::stop(emulator::SENT);
  const auto element = [](int lane, int word, int half) {
    unsigned bits;
    memcpy(&bits, &emulator::slots[6 * lane + word], 4);
    return __uint_as_float(half ? bits & 0xffff0000u : bits << 16);
  };
  for (int row = 0; row < 2; row++)
    for (int column = 0; column < 2; column++)
      for (int k = 0; k < 16; k++) {
        const int owner = k % 8 / 2, half = k % 2;
        d[2 * row + column] += element(warp + 4 * group + owner, row + k / 8 * 2, half) *
                               element(warp + 4 * (2 * place + column) + owner, 4 + k / 8, half);
      }
  emulator::stop(emulator::RECEIVED);
}

static void __syncthreads() { emulator::stop(emulator::BARRIER); }
static int __syncthreads_or(int value) {
  emulator::slots[threadIdx.x] = value;
  __syncthreads();
  const bool any = std::any_of(emulator::slots.begin(), emulator::slots.begin() + blockDim.x, [](float v) { return v != 0; });
  __syncthreads();
  return any;
}
static float __shfl_xor_sync(unsigned, float value, int mask) {
  const int here = threadIdx.x;
  emulator::slots[here] = value;
  emulator::stop(emulator::SENT);
  const float other = emulator::slots[here ^ mask];
  emulator::stop(emulator::RECEIVED);
  return other;
}
