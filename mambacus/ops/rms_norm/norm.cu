// Root mean square normalisation with the addition before it, for NVIDIA GPUs, compiled at run time by NVRTC; gpu.py gives the
// macros and launches.
//
// ROW_WARPS warps own a row at a time. Rows are contiguous, WIDTH elements each, moved in groups of VEC.
//
// Macros: WIDTH, VEC, WARPS of a block, ROW_WARPS; X_TYPE (residual), ADDED_TYPE, WEIGHT_TYPE, Y_TYPE; HAS_ADDED, HAS_GRAD_SUM (0 or 1).

#define GROUPS (WIDTH / VEC)
#define LANES (32 * ROW_WARPS)
#define BLOCK_ROWS (WARPS / ROW_WARPS)
#define MINE ((GROUPS + LANES - 1) / LANES)  // groups of a thread

struct Args {
  const void *x, *added, *weight, *grad_y, *grad_sum;
  void *sum, *y, *grad_x, *grad_added;
  float *scale;  // (rows,): 1 / root mean square
  float *part;   // (block x its rows, WIDTH): gradients of the weight
  long long rows;
  float eps;
};

// Sum over the threads of a row; all threads of the block call it together.
__device__ __forceinline__ float sum_over_row(float value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value += __shfl_xor_sync(0xffffffffu, value, mask);
  if (ROW_WARPS == 1) return value;
  __shared__ float s_sum[WARPS];
  const int warp = threadIdx.x / 32;
  __syncthreads();  // the sums of the row before have been read
  if (threadIdx.x % 32 == 0) s_sum[warp] = value;
  __syncthreads();
  float total = 0.0f;
#pragma unroll
  for (int w = 0; w < ROW_WARPS; w++) total += s_sum[warp / ROW_WARPS * ROW_WARPS + w];
  return total;
}

__device__ __forceinline__ bool owns(int k, int lane) { return GROUPS % LANES == 0 || k * LANES + lane < GROUPS; }

extern "C" __global__ void norm_forward(const Args p) {
  const int lane = threadIdx.x % LANES;
  const long long row = min((long long)blockIdx.x * BLOCK_ROWS + threadIdx.x / LANES, p.rows - 1);
  float x[MINE][VEC], squares = 0.0f;
#pragma unroll
  for (int k = 0; k < MINE; k++) {
    const long long place = row * WIDTH + (k * LANES + lane) * VEC;
    Pack<X_TYPE, VEC> own;
    Pack<ADDED_TYPE, VEC> added;
    if (owns(k, lane)) {
      own = load<X_TYPE, VEC>(at<X_TYPE>(p.x, place));
      if (HAS_ADDED) added = load<ADDED_TYPE, VEC>(at<ADDED_TYPE>(p.added, place));
    }
#pragma unroll
    for (int c = 0; c < VEC; c++) {
      x[k][c] = !owns(k, lane) ? 0.0f : HAS_ADDED ? own[c] + added[c] : own[c];
      if (HAS_ADDED) x[k][c] = rounded<X_TYPE>(x[k][c]);
      squares = fmaf(x[k][c], x[k][c], squares);
    }
    if (HAS_ADDED && owns(k, lane)) put<X_TYPE>(at<X_TYPE>(p.sum, place), x[k]);
  }
  const float scale = 1.0f / sqrtf(sum_over_row(squares) / WIDTH + p.eps);
  if (lane == 0) p.scale[row] = scale;
#pragma unroll
  for (int k = 0; k < MINE; k++) {
    if (!owns(k, lane)) continue;
    const int column = (k * LANES + lane) * VEC;
    const Pack<WEIGHT_TYPE, VEC> weight = load<WEIGHT_TYPE, VEC>(at<WEIGHT_TYPE>(p.weight, column));
    float y[VEC];
#pragma unroll
    for (int c = 0; c < VEC; c++) y[c] = rounded<WEIGHT_TYPE>(x[k][c] * scale) * weight[c];
    put<Y_TYPE>(at<Y_TYPE>(p.y, row * WIDTH + column), y);
  }
}

// Each thread walks through rows and holds its sums of the gradient of the weight in registers.
extern "C" __global__ void norm_backward(const Args p) {
  const int lane = threadIdx.x % LANES, own_row = threadIdx.x / LANES;
  float total[MINE][VEC];
#pragma unroll
  for (int k = 0; k < MINE; k++)
#pragma unroll
    for (int c = 0; c < VEC; c++) total[k][c] = 0.0f;
  for (long long first = (long long)blockIdx.x * BLOCK_ROWS; first < p.rows; first += (long long)gridDim.x * BLOCK_ROWS) {
    const bool counts = first + own_row < p.rows;  // else the last row is done again
    const long long row = min(first + own_row, p.rows - 1);
    const float scale = p.scale[row];
    Pack<X_TYPE, VEC> x[MINE];
    Pack<Y_TYPE, VEC> grad_y[MINE];
    float dot = 0.0f;
#pragma unroll
    for (int k = 0; k < MINE; k++) {
      if (!owns(k, lane)) continue;
      const int column = (k * LANES + lane) * VEC;
      x[k] = load<X_TYPE, VEC>(at<X_TYPE>(p.x, row * WIDTH + column));
      grad_y[k] = load<Y_TYPE, VEC>(at<Y_TYPE>(p.grad_y, row * WIDTH + column));
    }
#pragma unroll
    for (int k = 0; k < MINE; k++) {
      if (!owns(k, lane)) continue;
      const Pack<WEIGHT_TYPE, VEC> weight = load<WEIGHT_TYPE, VEC>(at<WEIGHT_TYPE>(p.weight, (k * LANES + lane) * VEC));
#pragma unroll
      for (int c = 0; c < VEC; c++) {
        const float normed = x[k][c] * scale;
        dot = fmaf(grad_y[k][c] * weight[c], normed, dot);
        total[k][c] = fmaf(counts ? grad_y[k][c] : 0.0f, rounded<WEIGHT_TYPE>(normed), total[k][c]);
      }
    }
    const float mean = sum_over_row(dot) / WIDTH;
#pragma unroll
    for (int k = 0; k < MINE; k++) {
      if (!owns(k, lane)) continue;
      const int column = (k * LANES + lane) * VEC;
      const long long place = row * WIDTH + column;
      const Pack<WEIGHT_TYPE, VEC> weight = load<WEIGHT_TYPE, VEC>(at<WEIGHT_TYPE>(p.weight, column));
      Pack<X_TYPE, VEC> grad_sum;
      if (HAS_GRAD_SUM) grad_sum = load<X_TYPE, VEC>(at<X_TYPE>(p.grad_sum, place));
      float grad[VEC];
#pragma unroll
      for (int c = 0; c < VEC; c++) {
        grad[c] = scale * (grad_y[k][c] * weight[c] - x[k][c] * scale * mean);
        if (HAS_GRAD_SUM) grad[c] += grad_sum[c];
      }
      put<X_TYPE>(at<X_TYPE>(p.grad_x, place), grad);
      if (HAS_ADDED && ADDED_TYPE != X_TYPE) put<ADDED_TYPE>(at<ADDED_TYPE>(p.grad_added, place), grad);
    }
  }
#pragma unroll
  for (int k = 0; k < MINE; k++)
    if (owns(k, lane)) put<0>(p.part + ((long long)blockIdx.x * BLOCK_ROWS + own_row) * WIDTH + (k * LANES + lane) * VEC, total[k]);
}
