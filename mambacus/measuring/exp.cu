// What the special function units give: every thread takes exponentials of its own numbers, ROUNDS x 16 of them.

struct Args {
  float* out;  // one for each thread, so that the work is not dropped
};

extern "C" __global__ void exponentials(const Args p) {
  float x[16];
#pragma unroll
  for (int k = 0; k < 16; k++) x[k] = threadIdx.x * -1e-3f - k;
  for (int round = 0; round < ROUNDS; round++)
#pragma unroll
    for (int k = 0; k < 16; k++) x[k] = exp2_fast(x[k]);
  float sum = 0.0f;
#pragma unroll
  for (int k = 0; k < 16; k++) sum += x[k];
  p.out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}
