// The selective scan for NVIDIA GPUs, compiled at run time by NVRTC; gpu_cuda.py gives the macros and launches.
//
// A block owns CHANNELS = 32 CPT channels of one row of the batch and walks along its tokens in tiles of TILE. Its WARPS warps
// share the channels and divide the states: a warp holds STATES_PER_WARP of them. What the states of a channel sum up to (y, and
// the gradients of delta and x) is added over the warps in shared memory once a tile; a sum over channels (the gradients of B
// and C) is added over the lanes of a warp. No value is exchanged between warps along the tokens, so the scan is the plain
// recurrence with its states in registers: per state and token one exponential and four other operations.
//
// Padding tokens and rows past the end have step 0: decay 1, drive 0. A restart adds RESTART to the exponent of the decay.
//
// Macros: one of FORWARD, BACKWARD, SEGMENT=0, SEGMENT=1; STATES, WARPS, CPT, TILE, CHUNK; X_TYPE, DELTA_TYPE, B_TYPE, C_TYPE, Z_TYPE (0 float32, 1 bfloat16, 2 float16);
// HAS_D, HAS_Z, HAS_BIAS, HAS_SEQ, HAS_STATE (initial state, or gradient of the final one), HAS_INITIAL (its gradient is wanted), HAS_CARRY,
// SOFTPLUS, SAVE, EXACT (d_inner is a multiple of CHANNELS) (0 or 1); MIN_BLOCKS for each multiprocessor.
//
// Loads of rows past the end and of channels past d_inner are moved to the last one and their values dropped: no branches.

#define CHANNELS (32 * CPT)
#define STATES_PER_WARP ((STATES + WARPS - 1) / WARPS)
#define PADDED_STATES (STATES_PER_WARP * WARPS)
#define THREADS (32 * WARPS)
#define ROWS (TILE / WARPS)  // rows of a tile that one warp loads and stores
#define LOG2_E 1.4426950408889634f
#define LN_2 0.6931471805599453f
#define RESTART -1e30f

template <int TYPE> struct Element { typedef unsigned short Type; };
template <> struct Element<0> { typedef float Type; };

template <int TYPE> __device__ __forceinline__ float widen(typename Element<TYPE>::Type value);
template <> __device__ __forceinline__ float widen<0>(float value) { return value; }
template <> __device__ __forceinline__ float widen<1>(unsigned short bits) { return __uint_as_float((unsigned)bits << 16); }
template <> __device__ __forceinline__ float widen<2>(unsigned short bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

template <int TYPE> __device__ __forceinline__ typename Element<TYPE>::Type narrow(float value);
template <> __device__ __forceinline__ float narrow<0>(float value) { return value; }
template <> __device__ __forceinline__ unsigned short narrow<1>(float value) {
  unsigned short bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
template <> __device__ __forceinline__ unsigned short narrow<2>(float value) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

// Rows are addressed in bytes from a pointer at token 0, so that an address is one multiply-add.
template <int TYPE> __device__ __forceinline__ float load(const char* origin, int row, int stride) {
  return widen<TYPE>(__ldg((const typename Element<TYPE>::Type*)(origin + (long long)row * stride)));
}
template <int TYPE> __device__ __forceinline__ void store(char* origin, int row, int stride, float value) {
  *(typename Element<TYPE>::Type*)(origin + (long long)row * stride) = narrow<TYPE>(value);
}
template <int TYPE> __device__ __forceinline__ const char* at(const void* tensor, long long index) {
  return (const char*)tensor + index * (long long)sizeof(typename Element<TYPE>::Type);
}

__device__ __forceinline__ float exp2_fast(float x) {  // results below 1e-38 become 0
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float sigmoid(float x) { return reciprocal(1.0f + exp2_fast(-x * LOG2_E)); }

// log(1 + exp(x)), relative error 1e-7: log(1 + e) = 2 artanh(s), s = e / (2 + e) <= 1/3, by a Chebyshev fit of error 4e-9.
__device__ __forceinline__ float softplus(float x) {
  float e = exp2_fast(-fabsf(x) * LOG2_E);
  float s = e * reciprocal(2.0f + e);
  float t = s * s;
  float series = fmaf(0.14087328635f, t, 0.13980709417f);
  series = fmaf(series, t, 0.20012426862f);
  series = fmaf(series, t, 0.33333157968f);
  series = fmaf(series, t, 1.0f);
  return fmaf(2.0f * s, series, x > 0.0f ? x : (x == x ? 0.0f : x));  // a NaN stays one
}

struct Args {
  const void *x, *delta, *B, *C, *z, *grad_y;
  const float *A, *D, *bias, *state;  // state: the initial state forwards, the gradient of the final one backwards
  const int* seq;
  void *y, *grad_x, *grad_delta, *grad_z, *grad_B, *grad_C;
  float* end_state;  // forwards the final state, backwards the gradient of the initial one
  float* carry;  // (batch, segment, n, d): state (forwards) or adjoint (backwards) that enters a segment, if HAS_CARRY
  float *segment_steps, *segment_restarts;  // (batch, segment, d) and (batch, segment): sums over a segment
  float* chunk_states;  // (batch, chunk, n, d)
  float *part_B, *part_C;  // (block, batch, n, padded)
  float* part_sums;  // (batch, segment, n + 2, d): gradients of A, D and bias from one segment of one row of the batch
  long long sxb, sdb, szb, sgb, sBb, sCb;  // strides of the batch, in elements
  int sxt, sdt, szt, sgt, sBt, sCt, sBn, sCn;  // strides of tokens and states, in bytes
  int batches, seqlen, d_inner, n_chunks, blocks, padded, segment;  // segment: tokens of one block, a multiple of CHUNK
};

__device__ __forceinline__ float step_of(float raw) { return SOFTPLUS ? softplus(raw) : raw; }

// Document id of a token of one row of the batch; negative: padding.
__device__ __forceinline__ bool is_real(const int* seq, int row, int seqlen) {
  return row < seqlen && (!HAS_SEQ || __ldg(seq + row) >= 0);
}

// What to add to the exponent of a token's decay.
__device__ __forceinline__ float restart_of(const int* seq, int row, int seqlen) {
  if (row == 0 || row >= seqlen) return 0.0f;
  const int here = __ldg(seq + row), before = __ldg(seq + row - 1);
  return here >= 0 && before >= 0 && here != before ? RESTART : 0.0f;
}

// State or adjoint that enters a block's segment.
__device__ __forceinline__ float entering(const Args& p, long long batch, int n, int d) {
  if (HAS_CARRY) return p.carry[((batch * gridDim.y + blockIdx.y) * STATES + n) * p.d_inner + d];
  return HAS_STATE ? p.state[(batch * p.d_inner + d) * STATES + n] : 0.0f;
}

// Where a row of the batch is too long for one block at a time (small batch), it is cut into segments: scan_segment finds what
// leaves each segment if nothing enters it, chain_segments what enters each, and then all segments run at once.
#ifdef SEGMENT  // 0: states, forwards; 1: adjoints, backwards
#define MATRIX_LOADS ((TILE * STATES + THREADS - 1) / THREADS)
#define MATRIX_TYPE (SEGMENT ? C_TYPE : B_TYPE)

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) scan_segment(const Args p) {
  __shared__ float s_step[TILE][CHANNELS], s_value[TILE][CHANNELS], s_sum[WARPS][CHANNELS];
  __shared__ __align__(16) float s_matrix[TILE][PADDED_STATES];
  __shared__ float s_restart[TILE];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, n0 = warp * STATES_PER_WARP;
  const long long batch = blockIdx.x / p.blocks;
  const int d0 = (blockIdx.x % p.blocks) * CHANNELS + lane, last = p.seqlen - 1;
  const int* seq = p.seq + (HAS_SEQ ? batch * p.seqlen : 0);

  float h[STATES_PER_WARP][CPT], a2[STATES_PER_WARP][CPT], bias[CPT], steps[CPT], restarts = 0.0f;
  const char *value_at[CPT], *delta_at[CPT], *z_at[CPT];
  bool there[CPT];
#pragma unroll
  for (int c = 0; c < CPT; c++) {
    there[c] = EXACT || d0 + 32 * c < p.d_inner;
    const int d = EXACT ? d0 + 32 * c : min(d0 + 32 * c, p.d_inner - 1);
    value_at[c] = SEGMENT ? at<X_TYPE>(p.grad_y, batch * p.sgb + d) : at<X_TYPE>(p.x, batch * p.sxb + d);
    delta_at[c] = at<DELTA_TYPE>(p.delta, batch * p.sdb + d);
    z_at[c] = at<Z_TYPE>(p.z, batch * p.szb + d);
    bias[c] = HAS_BIAS ? p.bias[d] : 0.0f;
    steps[c] = 0.0f;
#pragma unroll
    for (int i = 0; i < STATES_PER_WARP; i++) {
      a2[i][c] = n0 + i < STATES ? p.A[(long long)d * STATES + n0 + i] * LOG2_E : 0.0f;
      h[i][c] = 0.0f;
    }
  }
  const char* matrix_at = SEGMENT ? at<C_TYPE>(p.C, batch * p.sCb) : at<B_TYPE>(p.B, batch * p.sBb);
  const int matrix_n = SEGMENT ? p.sCn : p.sBn, matrix_t = SEGMENT ? p.sCt : p.sBt, value_t = SEGMENT ? p.sgt : p.sxt;
  for (int k = threadIdx.x; k < TILE * PADDED_STATES; k += THREADS) s_matrix[0][k] = 0.0f;

  const int begin = blockIdx.y * p.segment, end = min(begin + p.segment, p.seqlen);
  for (int done = 0; done < end - begin; done += TILE) {
    const int first = SEGMENT ? begin + (end - begin - done - 1) / TILE * TILE : begin + done;
    __syncthreads();
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      const int t = r * WARPS + warp, row = min(first + t, last);
      const bool real = is_real(seq, first + t, p.seqlen);
#pragma unroll
      for (int c = 0; c < CPT; c++) {
        const float raw = load<DELTA_TYPE>(delta_at[c], row, p.sdt), step = real ? step_of(raw + bias[c]) : 0.0f;
        float value = load<X_TYPE>(value_at[c], row, value_t);
        if (!SEGMENT) value *= step;
        if (SEGMENT && HAS_Z) {
          const float z = load<Z_TYPE>(z_at[c], row, p.szt);
          value *= z * sigmoid(z);
        }
        steps[c] += step;
        s_step[t][lane + 32 * c] = step;
        s_value[t][lane + 32 * c] = real ? value : 0.0f;
      }
      if (HAS_SEQ) {
        const float restart = restart_of(seq, first + t, p.seqlen);
        restarts += restart;
        if (lane == 0) s_restart[t] = restart;
      }
    }
#pragma unroll
    for (int k = 0; k < MATRIX_LOADS; k++) {
      const int index = threadIdx.x + k * THREADS, t = index / STATES, n = index % STATES, row = min(first + t, last);
      if (TILE * STATES % THREADS == 0 || index < TILE * STATES) {
        const float value = load<MATRIX_TYPE>(matrix_at + n * matrix_n, row, matrix_t);
        s_matrix[t][n] = is_real(seq, first + t, p.seqlen) ? value : 0.0f;
      }
    }
    __syncthreads();
#pragma unroll 4
    for (int k = 0; k < TILE; k++) {
      const int t = SEGMENT ? TILE - 1 - k : k;
#pragma unroll
      for (int c = 0; c < CPT; c++) {
        const float step = s_step[t][lane + 32 * c], value = s_value[t][lane + 32 * c];
#pragma unroll
        for (int i = 0; i < STATES_PER_WARP; i++) {
          const float decay = exp2_fast(HAS_SEQ ? fmaf(step, a2[i][c], s_restart[t]) : step * a2[i][c]);
          const float m = s_matrix[t][n0 + i];
          h[i][c] = SEGMENT ? decay * fmaf(value, m, h[i][c]) : fmaf(decay, h[i][c], value * m);
        }
      }
    }
  }
  const long long segment = batch * gridDim.y + blockIdx.y;
#pragma unroll
  for (int c = 0; c < CPT; c++) {
    s_sum[warp][lane + 32 * c] = steps[c];
#pragma unroll
    for (int i = 0; i < STATES_PER_WARP; i++)
      if (there[c] && n0 + i < STATES) p.carry[(segment * STATES + n0 + i) * p.d_inner + d0 + 32 * c] = h[i][c];
  }
  __syncthreads();
  if (warp == 0) {
#pragma unroll
    for (int c = 0; c < CPT; c++) {
      float total = 0.0f;
      for (int w = 0; w < WARPS; w++) total += s_sum[w][lane + 32 * c];
      if (there[c]) p.segment_steps[segment * p.d_inner + d0 + 32 * c] = total;
    }
  }
  if (HAS_SEQ) {
    __syncthreads();
    if (lane == 0) s_sum[warp][0] = restarts;
    __syncthreads();
    if (threadIdx.x == 0) {
      float total = 0.0f;
      for (int w = 0; w < WARPS; w++) total += s_sum[w][0];
      p.segment_restarts[segment] = total;
    }
  }
}

// One thread a channel and state: turns what leaves each segment into what enters it; what leaves the last one is end_state.
extern "C" __global__ void chain_segments(const Args p) {
  const int d = blockIdx.x * blockDim.x + threadIdx.x, n = blockIdx.y, segments = (p.seqlen + p.segment - 1) / p.segment;
  const long long batch = blockIdx.z;
  if (d >= p.d_inner) return;
  const float a2 = p.A[(long long)d * STATES + n] * LOG2_E;
  float h = HAS_STATE ? p.state[(batch * p.d_inner + d) * STATES + n] : 0.0f;
  for (int k = 0; k < segments; k++) {
    const long long segment = batch * segments + (SEGMENT ? segments - 1 - k : k);
    float* place = p.carry + (segment * STATES + n) * p.d_inner + d;
    const float local = *place, exponent = p.segment_steps[segment * p.d_inner + d] * a2;
    *place = h;
    h = fmaf(exp2_fast(HAS_SEQ ? exponent + p.segment_restarts[segment] : exponent), h, local);
  }
  p.end_state[(batch * p.d_inner + d) * STATES + n] = h;
}
#endif

#ifdef FORWARD
#define MATRIX_LOADS ((TILE * STATES + THREADS - 1) / THREADS)

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) scan_forward(const Args p) {
  __shared__ float s_step[TILE][CHANNELS], s_drive[TILE][CHANNELS], s_sum[WARPS][TILE][CHANNELS];
  __shared__ __align__(16) float s_B[TILE][PADDED_STATES], s_C[TILE][PADDED_STATES];
  __shared__ float s_restart[TILE];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, n0 = warp * STATES_PER_WARP;
  const long long batch = blockIdx.x / p.blocks;
  const int d0 = (blockIdx.x % p.blocks) * CHANNELS + lane, last = p.seqlen - 1;
  const int* seq = p.seq + (HAS_SEQ ? batch * p.seqlen : 0);

  float h[STATES_PER_WARP][CPT], a2[STATES_PER_WARP][CPT], bias[CPT], skip[CPT];
  const char *x_at[CPT], *delta_at[CPT], *z_at[CPT];
  char* y_at[CPT];
  bool there[CPT];
#pragma unroll
  for (int c = 0; c < CPT; c++) {
    there[c] = EXACT || d0 + 32 * c < p.d_inner;
    const int d = EXACT ? d0 + 32 * c : min(d0 + 32 * c, p.d_inner - 1);
    x_at[c] = at<X_TYPE>(p.x, batch * p.sxb + d);
    delta_at[c] = at<DELTA_TYPE>(p.delta, batch * p.sdb + d);
    z_at[c] = at<Z_TYPE>(p.z, batch * p.szb + d);
    y_at[c] = (char*)at<X_TYPE>(p.y, batch * p.seqlen * p.d_inner + d);
    bias[c] = HAS_BIAS ? p.bias[d] : 0.0f;
    skip[c] = HAS_D ? p.D[d] : 0.0f;
#pragma unroll
    for (int i = 0; i < STATES_PER_WARP; i++) {
      const bool used = there[c] && n0 + i < STATES;
      a2[i][c] = used ? p.A[(long long)d * STATES + n0 + i] * LOG2_E : 0.0f;
      h[i][c] = used ? entering(p, batch, n0 + i, d) : 0.0f;
    }
  }
  const char* B_at = at<B_TYPE>(p.B, batch * p.sBb);
  const char* C_at = at<C_TYPE>(p.C, batch * p.sCb);
  for (int k = threadIdx.x; k < TILE * PADDED_STATES; k += THREADS) s_B[0][k] = s_C[0][k] = 0.0f;

  // Loaded one tile ahead: the loads run while the tile before is scanned
  float next_x[ROWS][CPT], next_delta[ROWS][CPT], next_z[ROWS][CPT], next_B[MATRIX_LOADS], next_C[MATRIX_LOADS];
  auto fetch = [&](int first) {
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      const int row = min(first + r * WARPS + warp, last);
#pragma unroll
      for (int c = 0; c < CPT; c++) {
        next_x[r][c] = load<X_TYPE>(x_at[c], row, p.sxt);
        next_delta[r][c] = load<DELTA_TYPE>(delta_at[c], row, p.sdt);
        if (HAS_Z) next_z[r][c] = load<Z_TYPE>(z_at[c], row, p.szt);
      }
    }
#pragma unroll
    for (int k = 0; k < MATRIX_LOADS; k++) {
      const int index = threadIdx.x + k * THREADS, row = min(first + index / STATES, last), n = index % STATES;
      next_B[k] = load<B_TYPE>(B_at + n * p.sBn, row, p.sBt);
      next_C[k] = load<C_TYPE>(C_at + n * p.sCn, row, p.sCt);
    }
  };
  const int begin = blockIdx.y * p.segment, end = min(begin + p.segment, p.seqlen);
  fetch(begin);
  __syncthreads();
  for (int first = begin; first < end; first += TILE) {
    float x[ROWS][CPT], z[ROWS][CPT];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      const int t = r * WARPS + warp;
      const bool real = is_real(seq, first + t, p.seqlen);
#pragma unroll
      for (int c = 0; c < CPT; c++) {
        const float step = real ? step_of(next_delta[r][c] + bias[c]) : 0.0f;
        x[r][c] = real ? next_x[r][c] : 0.0f;
        z[r][c] = HAS_Z && real ? next_z[r][c] : 0.0f;
        s_step[t][lane + 32 * c] = step;
        s_drive[t][lane + 32 * c] = step * x[r][c];
      }
      if (HAS_SEQ && lane == 0) s_restart[t] = restart_of(seq, first + t, p.seqlen);
    }
#pragma unroll
    for (int k = 0; k < MATRIX_LOADS; k++) {
      const int index = threadIdx.x + k * THREADS, t = index / STATES, n = index % STATES;
      if (TILE * STATES % THREADS == 0 || index < TILE * STATES) {
        const bool real = is_real(seq, first + t, p.seqlen);
        s_B[t][n] = real ? next_B[k] : 0.0f;
        s_C[t][n] = real ? next_C[k] : 0.0f;
      }
    }
    __syncthreads();
    if (first + TILE < end) fetch(first + TILE);
    if (SAVE && first % CHUNK == 0) {
#pragma unroll
      for (int i = 0; i < STATES_PER_WARP; i++)
#pragma unroll
        for (int c = 0; c < CPT; c++)
          if (there[c] && n0 + i < STATES)
            p.chunk_states[((batch * p.n_chunks + first / CHUNK) * STATES + n0 + i) * p.d_inner + d0 + 32 * c] = h[i][c];
    }
#pragma unroll 4
    for (int t = 0; t < TILE; t++) {
#pragma unroll
      for (int c = 0; c < CPT; c++) {
        const float step = s_step[t][lane + 32 * c], drive = s_drive[t][lane + 32 * c];
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < STATES_PER_WARP; i++) {
          const float decay = exp2_fast(HAS_SEQ ? fmaf(step, a2[i][c], s_restart[t]) : step * a2[i][c]);
          h[i][c] = fmaf(decay, h[i][c], drive * s_B[t][n0 + i]);
          sum = fmaf(h[i][c], s_C[t][n0 + i], sum);
        }
        s_sum[warp][t][lane + 32 * c] = sum;
      }
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      const int t = r * WARPS + warp;
#pragma unroll
      for (int c = 0; c < CPT; c++) {
        float total = skip[c] * x[r][c];
#pragma unroll
        for (int w = 0; w < WARPS; w++) total += s_sum[w][t][lane + 32 * c];
        if (HAS_Z) total *= z[r][c] * sigmoid(z[r][c]);
        if (HAS_SEQ) total = is_real(seq, first + t, p.seqlen) ? total : 0.0f;
        if (first + t < p.seqlen && there[c]) store<X_TYPE>(y_at[c], first + t, p.d_inner * (int)sizeof(Element<X_TYPE>::Type), total);
      }
    }
  }
  if (HAS_CARRY) return;  // the end state came with the carries
#pragma unroll
  for (int i = 0; i < STATES_PER_WARP; i++)
#pragma unroll
    for (int c = 0; c < CPT; c++)
      if (there[c] && n0 + i < STATES) p.end_state[(batch * p.d_inner + d0 + 32 * c) * STATES + n0 + i] = h[i][c];
}
#endif

#ifdef BACKWARD
#define TILES (CHUNK / TILE)
#define MATRIX_LOADS ((CHUNK * STATES + THREADS - 1) / THREADS)

// Sums over the lanes of a warp of 2 TILE values each; a lane ends with the total of value lane * 2 TILE / 32. Each round a lane
// hands half of its values to its partner and adds the half it gets: 2 TILE - 1 exchanges in place of 10 TILE.
template <int HALF, int MASK> __device__ __forceinline__ void exchange(float (&v)[2 * TILE], int lane) {
  const bool upper = lane & MASK;
#pragma unroll
  for (int k = 0; k < HALF; k++) {
    const float kept = upper ? v[k + HALF] : v[k], sent = upper ? v[k] : v[k + HALF];
    v[k] = kept + __shfl_xor_sync(0xffffffffu, sent, MASK);
  }
  if (HALF == 0) v[0] += __shfl_xor_sync(0xffffffffu, v[0], MASK);
}
__device__ __forceinline__ float sum_over_lanes(float (&v)[2 * TILE], int lane) {
  exchange<TILE, 16>(v, lane);
  exchange<TILE / 2, 8>(v, lane);
  exchange<TILE / 4, 4>(v, lane);
  exchange<TILE / 8, 2>(v, lane);
  exchange<TILE / 16, 1>(v, lane);
  return v[0];
}

// Chunk by chunk from the end. For each, the states at its tiles are recomputed from the saved one; then each tile, from the
// last, recomputes its states and runs the adjoint recurrence backwards.
extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) scan_backward(const Args p) {
  extern __shared__ __align__(16) float memory[];
  // Private to a thread (its states and channels): states at the tiles of a chunk, adjoint, gradient of A, log2(e) A
  float(*s_h)[PADDED_STATES][CHANNELS] = (float(*)[PADDED_STATES][CHANNELS])memory;
  float(*s_g)[CHANNELS] = s_h[TILES];
  float(*s_dA)[CHANNELS] = s_g + PADDED_STATES;
  float(*s_a2)[CHANNELS] = s_dA + PADDED_STATES;
  // Shared by the warps: a chunk's steps, drives, gradients before the gate, B and C; a tile's sums
  float(*s_step)[CHANNELS] = s_a2 + PADDED_STATES;
  float(*s_drive)[CHANNELS] = s_step + CHUNK;
  float(*s_grad)[CHANNELS] = s_drive + CHUNK;
  float(*s_sum)[3][TILE][CHANNELS] = (float(*)[3][TILE][CHANNELS])(s_grad + CHUNK);
  float(*s_B)[CHUNK] = (float(*)[CHUNK])(s_sum + WARPS);
  float(*s_C)[CHUNK] = s_B + PADDED_STATES;
  float* s_restart = (float*)(s_C + PADDED_STATES);

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, n0 = warp * STATES_PER_WARP;
  const long long batch = blockIdx.x / p.blocks;
  const int block = blockIdx.x % p.blocks, d0 = block * CHANNELS + lane, last = p.seqlen - 1;
  const int* seq = p.seq + (HAS_SEQ ? batch * p.seqlen : 0);

  float bias[CPT], skip[CPT], sum_D[CPT], sum_bias[CPT];
  const char *x_at[CPT], *delta_at[CPT], *z_at[CPT], *grad_at[CPT];
  char *to_x[CPT], *to_delta[CPT], *to_z[CPT];
  bool there[CPT];
#pragma unroll
  for (int c = 0; c < CPT; c++) {
    there[c] = EXACT || d0 + 32 * c < p.d_inner;
    const int d = EXACT ? d0 + 32 * c : min(d0 + 32 * c, p.d_inner - 1);
    const long long out = batch * p.seqlen * p.d_inner + d;
    x_at[c] = at<X_TYPE>(p.x, batch * p.sxb + d);
    delta_at[c] = at<DELTA_TYPE>(p.delta, batch * p.sdb + d);
    z_at[c] = at<Z_TYPE>(p.z, batch * p.szb + d);
    grad_at[c] = at<X_TYPE>(p.grad_y, batch * p.sgb + d);
    to_x[c] = (char*)at<X_TYPE>(p.grad_x, out);
    to_delta[c] = (char*)at<DELTA_TYPE>(p.grad_delta, out);
    to_z[c] = (char*)at<Z_TYPE>(p.grad_z, out);
    bias[c] = HAS_BIAS ? p.bias[d] : 0.0f;
    skip[c] = HAS_D ? p.D[d] : 0.0f;
    sum_D[c] = sum_bias[c] = 0.0f;
    for (int n = n0; n < n0 + STATES_PER_WARP; n++) {
      const bool used = there[c] && n < STATES;
      s_a2[n][lane + 32 * c] = used ? p.A[(long long)d * STATES + n] * LOG2_E : 0.0f;
      s_g[n][lane + 32 * c] = used ? entering(p, batch, n, d) : 0.0f;
      s_dA[n][lane + 32 * c] = 0.0f;
      s_h[0][n][lane + 32 * c] = 0.0f;
    }
  }
  const char* B_at = at<B_TYPE>(p.B, batch * p.sBb);
  const char* C_at = at<C_TYPE>(p.C, batch * p.sCb);
  for (int k = threadIdx.x; k < PADDED_STATES * CHUNK; k += THREADS) s_B[0][k] = s_C[0][k] = 0.0f;

  const int first_chunk = blockIdx.y * (p.segment / CHUNK);
  for (int chunk = min(first_chunk + p.segment / CHUNK, p.n_chunks) - 1; chunk >= first_chunk; chunk--) {
    const int begin = chunk * CHUNK, tiles = (min(CHUNK, p.seqlen - begin) + TILE - 1) / TILE;
    __syncthreads();
#pragma unroll 4
    for (int t = warp; t < CHUNK; t += WARPS) {
      const bool real = is_real(seq, begin + t, p.seqlen);
      const int row = min(begin + t, last);
#pragma unroll
      for (int c = 0; c < CPT; c++) {
        const float x = load<X_TYPE>(x_at[c], row, p.sxt), raw = load<DELTA_TYPE>(delta_at[c], row, p.sdt);
        const float step = real ? step_of(raw + bias[c]) : 0.0f;
        float grad = load<X_TYPE>(grad_at[c], row, p.sgt);
        if (HAS_Z) {
          const float z = load<Z_TYPE>(z_at[c], row, p.szt);
          grad *= z * sigmoid(z);
        }
        s_step[t][lane + 32 * c] = step;
        s_drive[t][lane + 32 * c] = real ? step * x : 0.0f;
        s_grad[t][lane + 32 * c] = real && there[c] ? grad : 0.0f;
      }
      if (HAS_SEQ && lane == 0) s_restart[t] = restart_of(seq, begin + t, p.seqlen);
    }
#pragma unroll 4
    for (int k = 0; k < MATRIX_LOADS; k++) {
      const int index = threadIdx.x + k * THREADS, t = index / STATES, n = index % STATES, row = min(begin + t, last);
      if (CHUNK * STATES % THREADS == 0 || index < CHUNK * STATES) {
        const bool real = is_real(seq, begin + t, p.seqlen);
        const float b = load<B_TYPE>(B_at + n * p.sBn, row, p.sBt), c = load<C_TYPE>(C_at + n * p.sCn, row, p.sCt);
        s_B[n][t] = real ? b : 0.0f;
        s_C[n][t] = real ? c : 0.0f;
      }
    }
    for (int n = n0; n < min(n0 + STATES_PER_WARP, STATES); n++)
#pragma unroll
      for (int c = 0; c < CPT; c++)
        if (there[c])
          s_h[0][n][lane + 32 * c] =
              p.chunk_states[((batch * p.n_chunks + chunk) * STATES + n) * p.d_inner + d0 + 32 * c];
    __syncthreads();

    for (int tile = 0; tile < tiles - 1; tile++) {  // forwards, for the states at the tiles
      float step[TILE][CPT], drive[TILE][CPT];
#pragma unroll
      for (int t = 0; t < TILE; t++)
#pragma unroll
        for (int c = 0; c < CPT; c++) {
          step[t][c] = s_step[tile * TILE + t][lane + 32 * c];
          drive[t][c] = s_drive[tile * TILE + t][lane + 32 * c];
        }
#pragma unroll 1
      for (int n = n0; n < n0 + STATES_PER_WARP; n++) {
        const float *B = s_B[n] + tile * TILE, *restart = s_restart + tile * TILE;
#pragma unroll
        for (int c = 0; c < CPT; c++) {
          const float a2 = s_a2[n][lane + 32 * c];
          float h = s_h[tile][n][lane + 32 * c];
#pragma unroll
          for (int t = 0; t < TILE; t++) {
            const float exponent = HAS_SEQ ? fmaf(step[t][c], a2, restart[t]) : step[t][c] * a2;
            h = fmaf(exp2_fast(exponent), h, drive[t][c] * B[t]);
          }
          s_h[tile + 1][n][lane + 32 * c] = h;
        }
      }
    }

    for (int tile = tiles - 1; tile >= 0; tile--) {  // backwards
      const int offset = tile * TILE;
      float step[TILE][CPT], drive[TILE][CPT], grad[TILE][CPT];
      float total[TILE][CPT], grad_exponent[TILE][CPT], grad_drive[TILE][CPT];
#pragma unroll
      for (int t = 0; t < TILE; t++)
#pragma unroll
        for (int c = 0; c < CPT; c++) {
          step[t][c] = s_step[offset + t][lane + 32 * c];
          drive[t][c] = s_drive[offset + t][lane + 32 * c];
          grad[t][c] = s_grad[offset + t][lane + 32 * c];
          total[t][c] = grad_exponent[t][c] = grad_drive[t][c] = 0.0f;
        }
#pragma unroll 1
      for (int n = n0; n < n0 + STATES_PER_WARP; n++) {
        const float *B = s_B[n] + offset, *C = s_C[n] + offset, *restart = s_restart + offset;
        float sums[2 * TILE];  // gradients of B, then of C, from this thread's channels
#pragma unroll
        for (int c = 0; c < CPT; c++) {
          const float a2 = s_a2[n][lane + 32 * c];
          float decay[TILE], kept[TILE];  // kept: what remains of the state before the token
          float h = s_h[tile][n][lane + 32 * c];
#pragma unroll
          for (int t = 0; t < TILE; t++) {
            decay[t] = exp2_fast(HAS_SEQ ? fmaf(step[t][c], a2, restart[t]) : step[t][c] * a2);
            kept[t] = decay[t] * h;
            h = fmaf(drive[t][c], B[t], kept[t]);
            if (HAS_Z) total[t][c] = fmaf(h, C[t], total[t][c]);
            sums[TILE + t] = c == 0 ? grad[t][c] * h : fmaf(grad[t][c], h, sums[TILE + t]);
          }
          float g = s_g[n][lane + 32 * c], dA = s_dA[n][lane + 32 * c];
#pragma unroll
          for (int t = TILE - 1; t >= 0; t--) {
            const float into = fmaf(grad[t][c], C[t], g);
            g = decay[t] * into;
            const float pull = into * kept[t];
            grad_exponent[t][c] = fmaf(pull, a2, grad_exponent[t][c]);
            grad_drive[t][c] = fmaf(into, B[t], grad_drive[t][c]);
            dA = fmaf(pull, step[t][c], dA);
            sums[t] = c == 0 ? into * drive[t][c] : fmaf(into, drive[t][c], sums[t]);
          }
          s_g[n][lane + 32 * c] = g;
          s_dA[n][lane + 32 * c] = dA;
        }
        const float sum = sum_over_lanes(sums, lane);
        const int value = lane * (2 * TILE) / 32;
        float* part = (value < TILE ? p.part_B : p.part_C) + (((long long)block * p.batches + batch) * STATES + n) * p.padded;
        if (n < STATES && lane % (32 / (2 * TILE)) == 0) part[begin + offset + value % TILE] = sum;
      }
      __syncthreads();  // the sums of the tile before have been read
#pragma unroll
      for (int t = 0; t < TILE; t++)
#pragma unroll
        for (int c = 0; c < CPT; c++) {
          s_sum[warp][0][t][lane + 32 * c] = grad_exponent[t][c];
          s_sum[warp][1][t][lane + 32 * c] = grad_drive[t][c];
          if (HAS_Z) s_sum[warp][2][t][lane + 32 * c] = total[t][c];
        }
      __syncthreads();
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        const int t = r * WARPS + warp, row = min(begin + offset + t, last);
        const bool real = is_real(seq, begin + offset + t, p.seqlen);
#pragma unroll
        for (int c = 0; c < CPT; c++) {
          float from_exponent = 0.0f, from_drive = 0.0f, y = 0.0f;
#pragma unroll
          for (int w = 0; w < WARPS; w++) {
            from_exponent += s_sum[w][0][t][lane + 32 * c];
            from_drive += s_sum[w][1][t][lane + 32 * c];
            if (HAS_Z) y += s_sum[w][2][t][lane + 32 * c];
          }
          const float x = real ? load<X_TYPE>(x_at[c], row, p.sxt) : 0.0f;
          const float before_gate = s_grad[offset + t][lane + 32 * c];
          const float d_x = fmaf(from_drive, s_step[offset + t][lane + 32 * c], skip[c] * before_gate);
          float d_delta = fmaf(from_exponent, LN_2, from_drive * x);
          if (SOFTPLUS) d_delta *= sigmoid(load<DELTA_TYPE>(delta_at[c], row, p.sdt) + bias[c]);
          d_delta = real ? d_delta : 0.0f;
          sum_D[c] = fmaf(before_gate, x, sum_D[c]);
          sum_bias[c] += d_delta;
          float d_z = 0.0f;
          if (HAS_Z) {
            const float z = load<Z_TYPE>(z_at[c], row, p.szt), s = sigmoid(z);
            d_z = load<X_TYPE>(grad_at[c], row, p.sgt) * fmaf(skip[c], x, y) * s * fmaf(z, 1.0f - s, 1.0f);
          }
          if (begin + offset + t < p.seqlen && there[c]) {
            store<X_TYPE>(to_x[c], row, p.d_inner * (int)sizeof(Element<X_TYPE>::Type), real ? d_x : 0.0f);
            store<DELTA_TYPE>(to_delta[c], row, p.d_inner * (int)sizeof(Element<DELTA_TYPE>::Type), d_delta);
            if (HAS_Z) store<Z_TYPE>(to_z[c], row, p.d_inner * (int)sizeof(Element<Z_TYPE>::Type), real ? d_z : 0.0f);
          }
        }
      }
    }
  }

  __syncthreads();
#pragma unroll
  for (int c = 0; c < CPT; c++) {
    s_sum[warp][0][0][lane + 32 * c] = sum_D[c];
    s_sum[warp][1][0][lane + 32 * c] = sum_bias[c];
  }
  __syncthreads();
#pragma unroll
  for (int c = 0; c < CPT; c++) {
    if (!there[c]) continue;
    const long long d = d0 + 32 * c;
    float* sums = p.part_sums + (batch * gridDim.y + blockIdx.y) * (STATES + 2) * p.d_inner + d;
    for (int n = n0; n < min(n0 + STATES_PER_WARP, STATES); n++) {
      sums[(long long)n * p.d_inner] = s_dA[n][lane + 32 * c];
      if (HAS_INITIAL && !HAS_CARRY) p.end_state[(batch * p.d_inner + d) * STATES + n] = s_g[n][lane + 32 * c];
    }
    if (warp < 2) {
      float total = 0.0f;
      for (int w = 0; w < WARPS; w++) total += s_sum[w][warp][0][lane + 32 * c];
      sums[(long long)(STATES + warp) * p.d_inner] = total;
    }
  }
}

// Sums the partial gradients of B (grid.z = 0) and C over the blocks, in a fixed order, and puts them as (batch, seqlen, n).
extern "C" __global__ void sum_tokens(const Args p) {
  __shared__ float s_total[STATES][33];
  const long long batch = blockIdx.y;
  const int first = blockIdx.x * 32;
  for (int n = threadIdx.x / 32; n < STATES; n += blockDim.x / 32) {
    const float* part = (blockIdx.z == 0 ? p.part_B : p.part_C) + (batch * STATES + n) * p.padded + first;
    float total = 0.0f;
#pragma unroll 8
    for (int block = 0; block < p.blocks; block++)
      total += part[(long long)block * p.batches * STATES * p.padded + threadIdx.x % 32];
    s_total[n][threadIdx.x % 32] = total;
  }
  __syncthreads();
  for (int k = threadIdx.x; k < 32 * STATES; k += blockDim.x) {
    const int t = k / STATES, n = k % STATES;
    if (first + t >= p.seqlen) continue;
    const long long out = (batch * p.seqlen + first + t) * STATES + n;
    if (blockIdx.z == 0) store<B_TYPE>((char*)at<B_TYPE>(p.grad_B, out), 0, 0, s_total[n][t]);
    else store<C_TYPE>((char*)at<C_TYPE>(p.grad_C, out), 0, 0, s_total[n][t]);
  }
}
#endif
