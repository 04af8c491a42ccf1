// Cross entropy of rows of logits, which become their gradients, for NVIDIA GPUs, compiled at run time by NVRTC; gpu.py gives the
// macros and launches.
//
// Sums name their fused multiply-adds, so that the loss has the same bits with and without the gradient: left to it, the compiler
// fuses other products in the two.
//
// A block owns a row. One pass finds its maximum and the sum of exponentials, a second one, out of the cache, the gradient.
//
// Macros: COLUMNS, VEC, THREADS; LOGITS_TYPE; GRADIENT (0 or 1).

#define GROUPS (COLUMNS / VEC)

struct Args {
  void* logits;  // (rows, COLUMNS)
  const long long* targets;  // (rows,), negative: not counted
  float* losses;  // (rows,)
};

// Sums scaled by a running maximum, in powers of two: total = sum of 2^(x - most).
struct Total {
  float most, sum;
  __device__ __forceinline__ void join(float other_most, float other_sum) {
    const float larger = fmaxf(most, other_most);
    sum = fmaf(sum, exp2_fast(most - larger), other_sum * exp2_fast(other_most - larger));
    most = larger;
  }
};

extern "C" __global__ void __launch_bounds__(THREADS) cross_entropy(const Args p) {
  __shared__ float s_most[THREADS / 32], s_sum[THREADS / 32];
  const long long row = blockIdx.x;
  char* logits = at<LOGITS_TYPE>(p.logits, row * COLUMNS);
  const long long target = p.targets[row];
  Total own = {-1e30f, 0.0f};
  for (int k = threadIdx.x; k < GROUPS; k += THREADS) {
    const Pack<LOGITS_TYPE, VEC> pack = load<LOGITS_TYPE, VEC>(at<LOGITS_TYPE>(logits, k * VEC));
    float most = own.most, sum = 0.0f;
#pragma unroll
    for (int c = 0; c < VEC; c++) most = fmaxf(most, pack[c] * LOG2_E);
#pragma unroll
    for (int c = 0; c < VEC; c++) sum += exp2_fast(fmaf(pack[c], LOG2_E, -most));
    own.sum = fmaf(own.sum, exp2_fast(own.most - most), sum);
    own.most = most;
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    const float most = __shfl_xor_sync(0xffffffffu, own.most, mask), sum = __shfl_xor_sync(0xffffffffu, own.sum, mask);
    own.join(most, sum);
  }
  if (threadIdx.x % 32 == 0) {
    s_most[threadIdx.x / 32] = own.most;
    s_sum[threadIdx.x / 32] = own.sum;
  }
  const bool outside = target >= COLUMNS;  // of the vocabulary: an error of the caller, whose loss is no number
  const float chosen = target < 0 || outside ? 0.0f : load<LOGITS_TYPE>(at<LOGITS_TYPE>(logits, target))[0];
  __syncthreads();
  own = {s_most[0], s_sum[0]};
  for (int w = 1; w < THREADS / 32; w++) own.join(s_most[w], s_sum[w]);
  float log2_total = own.most + log2f(own.sum);
  if (outside) log2_total = __uint_as_float(0x7fc00000u);
  if (threadIdx.x == 0) p.losses[row] = target < 0 ? 0.0f : fmaf(log2_total, LN_2, -chosen);
  if (!GRADIENT) return;
  __syncthreads();  // the target's logit has been read
  for (int k = threadIdx.x; k < GROUPS; k += THREADS) {
    const Pack<LOGITS_TYPE, VEC> pack = load<LOGITS_TYPE, VEC>(at<LOGITS_TYPE>(logits, k * VEC));
    float grad[VEC];
#pragma unroll
    for (int c = 0; c < VEC; c++) {
      grad[c] = exp2_fast(fmaf(pack[c], LOG2_E, -log2_total)) - (k * VEC + c == target ? 1.0f : 0.0f);
      grad[c] = target < 0 ? 0.0f : grad[c];
    }
    put<LOGITS_TYPE>(at<LOGITS_TYPE>(logits, k * VEC), grad);
  }
}
