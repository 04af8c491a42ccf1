// The column of the largest number of each row, for NVIDIA GPUs, compiled at run time by NVRTC; gpu.py gives the macros and launches.
//
// A block owns a row: its threads take groups of neighbours in turns, then their findings are compared within warps and between them.
//
// Macros: COLUMNS, VEC, THREADS.

#define GROUPS (COLUMNS / VEC)
#define WARPS (THREADS / 32)
#define INFINITE __uint_as_float(0x7f800000u)

struct Args {
  const float* logits;  // (rows, COLUMNS)
  long long* columns;   // (rows,)
};

// The largest number so far, and the first column where it stands. NaN is larger than all and stands in column -1.
struct Largest {
  float number;
  int column;
  __device__ __forceinline__ void join(float other, int other_column) {
    if (other > number || (other == number && other_column < column)) number = other, column = other_column;
  }
};

extern "C" __global__ void __launch_bounds__(THREADS) likeliest(const Args p) {
  __shared__ float s_number[WARPS];
  __shared__ int s_column[WARPS];
  const float* row = p.logits + (long long)blockIdx.x * COLUMNS;
  Largest own = {-INFINITE, COLUMNS};
#pragma unroll 4
  for (int k = threadIdx.x; k < GROUPS; k += THREADS) {
    const Pack<0, VEC> pack = floats<VEC>(row + k * VEC);
#pragma unroll
    for (int c = 0; c < VEC; c++) {
      const bool is_number = pack[c] == pack[c];
      own.join(is_number ? pack[c] : INFINITE, is_number ? k * VEC + c : -1);
    }
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    const float number = __shfl_xor_sync(0xffffffffu, own.number, mask);
    own.join(number, __shfl_xor_sync(0xffffffffu, own.column, mask));
  }
  if (threadIdx.x % 32 == 0) s_number[threadIdx.x / 32] = own.number, s_column[threadIdx.x / 32] = own.column;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < WARPS; w++) own.join(s_number[w], s_column[w]);
  p.columns[blockIdx.x] = own.column;
}
