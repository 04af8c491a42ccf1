// The selective scan for NVIDIA GPUs, compiled at run time by NVRTC; gpu_cuda.py gives the macros and launches.
//
// A block owns CHANNELS channels of one row of the batch and walks along its tokens in tiles of TILE. Its WARPS warps share the
// channels, one a lane, and divide the states: a warp holds STATES_PER_WARP of them. No value is exchanged between warps along
// the tokens: the scan is the plain recurrence with its states in registers, per state and token one exponential and four other
// operations. What the states of a channel sum up to (y, and the gradients of delta and x) is added over the warps in shared
// memory once a tile; what the channels sum up to (the gradients of B and C) is added over the lanes by tensor cores.
//
// What is done once for a token and channel (softplus, gates, loads and stores) is laid out differently: a thread takes *groups*
// of neighbouring channels, as many as fill its widest load, and hands the values over in shared memory.
//
// Padding tokens and rows past the end have step 0: decay 1, drive 0. A restart adds RESTART to the exponent of the decay.
// Loads of rows past the end and of channels past d_inner are moved to the last one and their values dropped: no branches.
//
// Macros: one of FORWARD, BACKWARD, SEGMENT=0, SEGMENT=1; STATES, WARPS, TILE, CHUNK; X_TYPE, DELTA_TYPE, B_TYPE, C_TYPE, Z_TYPE;
// VEC, MATRIX_VEC: elements of a group of channels, and of states of B and C; MIN_BLOCKS for each multiprocessor; (0 or 1) HAS_D,
// HAS_Z, HAS_BIAS, HAS_SEQ, HAS_STATE (initial state, or gradient of the final one), HAS_INITIAL (its gradient is wanted),
// HAS_CARRY, SOFTPLUS, SAVE, EXACT (d_inner is a multiple of CHANNELS).

#define CHANNELS 32
#define STATES_PER_WARP ((STATES + WARPS - 1) / WARPS)
#define PADDED_STATES (STATES_PER_WARP * WARPS)
#define THREADS (32 * WARPS)
#define RESTART -1e30f
#define NO_STEP (SOFTPLUS ? -1e30f : 0.0f)  // before softplus

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
  float *grad_A, *grad_D, *grad_bias;
  long long sxb, sdb, szb, sgb, sBb, sCb, sob;  // strides of the batch, in elements; o: grad_z
  int sxt, sdt, szt, sgt, sBt, sCt, sBn, sCn, sot;  // strides of tokens and states, in bytes
  int batches, seqlen, d_inner, n_chunks, blocks, padded, segment;  // segment: tokens of one block, a multiple of CHUNK
};

// log(1 + exp(x)), relative error 1e-7: log(1 + e) / e for 0 <= e <= 1 by a minimax polynomial.
__device__ __forceinline__ float softplus(float x) {
  const float e = exp2_fast(-fabsf(x) * LOG2_E);
  float series = fmaf(0.005232690833508968f, e, -0.029505228623747826f);
  series = fmaf(series, e, 0.07822594791650772f);
  series = fmaf(series, e, -0.13663245737552643f);
  series = fmaf(series, e, 0.19106008112430573f);
  series = fmaf(series, e, -0.2484298199415207f);
  series = fmaf(series, e, 0.3331909775733948f);
  series = fmaf(series, e, -0.4999949336051941f);
  series = fmaf(series, e, 0.9999999403953552f);
  return fmaf(e, series, x > 0.0f ? x : (x == x ? 0.0f : x));  // a NaN stays one
}
__device__ __forceinline__ float step_of(float raw) { return SOFTPLUS ? softplus(raw) : raw; }

// Whether a row is a token: inside the sequence and no padding.
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

// N elements of a row from a channel on; all threads share the origin, a row near by, so 32 bits hold what differs.
template <int TYPE, int N>
__device__ __forceinline__ Pack<TYPE, N> pick(const char* origin, int row, int stride, int channel) {
  return *(const Pack<TYPE, N>*)(origin + (unsigned)(row * stride + channel * ELEMENT_BYTES(TYPE)));
}

// A thread's part of ROWS x CHANNELS elements: N neighbouring channels of every STRIDE-th row.
template <int ROWS> struct Share {
  static constexpr int N = VEC < ROWS / WARPS ? VEC : ROWS / WARPS, GROUPS = CHANNELS / N, STRIDE = THREADS / GROUPS,
                       COUNT = ROWS / STRIDE;
  static_assert(COUNT * STRIDE == ROWS, "the threads divide the rows");
  static __device__ __forceinline__ int row(int k) { return threadIdx.x / GROUPS + k * STRIDE; }
  static __device__ __forceinline__ int channel() { return threadIdx.x % GROUPS * N; }
};

// A thread's part of ROWS x STATES elements of B or C: MATRIX_VEC neighbouring states of a row.
template <int ROWS> struct MatrixShare {
  static constexpr int PER_ROW = STATES / MATRIX_VEC, ALL = ROWS * PER_ROW, COUNT = (ALL + THREADS - 1) / THREADS;
  static __device__ __forceinline__ bool used(int k) {
    return ALL % THREADS == 0 || threadIdx.x + k * THREADS < ALL;
  }
  static __device__ __forceinline__ int row(int k) { return (threadIdx.x + k * THREADS) / PER_ROW; }
  static __device__ __forceinline__ int state(int k) { return (threadIdx.x + k * THREADS) % PER_ROW * MATRIX_VEC; }
};

// Where a row of the batch is too long for one block at a time (small batch), it is cut into segments: scan_segment finds what
// leaves each segment if nothing enters it, chain_segments what enters each, and then all segments run at once.
#ifdef SEGMENT  // 0: states, forwards; 1: adjoints, backwards
#define MATRIX_TYPE (SEGMENT ? C_TYPE : B_TYPE)

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) scan_segment(const Args p) {
  typedef Share<TILE> Own;
  typedef MatrixShare<TILE> OwnMatrix;
  __shared__ __align__(16) float2 s_pair[TILE][CHANNELS];  // step, value
  __shared__ __align__(16) float s_matrix[TILE][PADDED_STATES];
  __shared__ float s_sum[Own::STRIDE][CHANNELS], s_restart[TILE], s_restarts[WARPS];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, n0 = warp * STATES_PER_WARP;
  const long long batch = blockIdx.x / p.blocks;
  const int d0 = (blockIdx.x % p.blocks) * CHANNELS, d = d0 + lane, last = p.seqlen - 1;
  const int* seq = p.seq + (HAS_SEQ ? batch * p.seqlen : 0);
  const bool there = EXACT || d < p.d_inner;

  float h[STATES_PER_WARP], a2[STATES_PER_WARP], restarts = 0.0f;
#pragma unroll
  for (int i = 0; i < STATES_PER_WARP; i++) {
    a2[i] = there && n0 + i < STATES ? p.A[(long long)d * STATES + n0 + i] * LOG2_E : 0.0f;
    h[i] = 0.0f;
  }
  const int own = d0 + Own::channel(), own_d = EXACT ? own : min(own, p.d_inner - Own::N);
  const char* value_at = SEGMENT ? at<X_TYPE>(p.grad_y, batch * p.sgb + own_d) : at<X_TYPE>(p.x, batch * p.sxb + own_d);
  const char *delta_at = at<DELTA_TYPE>(p.delta, batch * p.sdb + own_d), *z_at = at<Z_TYPE>(p.z, batch * p.szb + own_d);
  const char* matrix_at = SEGMENT ? at<C_TYPE>(p.C, batch * p.sCb) : at<B_TYPE>(p.B, batch * p.sBb);
  const int matrix_n = SEGMENT ? p.sCn : p.sBn, matrix_t = SEGMENT ? p.sCt : p.sBt, value_t = SEGMENT ? p.sgt : p.sxt;
  float bias[Own::N], steps[Own::N];
#pragma unroll
  for (int c = 0; c < Own::N; c++) {
    bias[c] = HAS_BIAS ? p.bias[own_d + c] : 0.0f;
    steps[c] = 0.0f;
  }
  for (int k = threadIdx.x; k < TILE * PADDED_STATES; k += THREADS) s_matrix[0][k] = 0.0f;

  const int begin = blockIdx.y * p.segment, end = min(begin + p.segment, p.seqlen);
  for (int done = 0; done < end - begin; done += TILE) {
    const int first = SEGMENT ? begin + (end - begin - done - 1) / TILE * TILE : begin + done;
    Pack<X_TYPE, Own::N> value[Own::COUNT];
    Pack<DELTA_TYPE, Own::N> delta[Own::COUNT];
    Pack<Z_TYPE, Own::N> z[Own::COUNT];
    Pack<MATRIX_TYPE, MATRIX_VEC> matrix[OwnMatrix::COUNT];
#pragma unroll
    for (int k = 0; k < Own::COUNT; k++) {
      const int row = min(first + Own::row(k), last);
      value[k] = load<X_TYPE, Own::N>(value_at, row, value_t);
      delta[k] = load<DELTA_TYPE, Own::N>(delta_at, row, p.sdt);
      if (SEGMENT && HAS_Z) z[k] = load<Z_TYPE, Own::N>(z_at, row, p.szt);
    }
#pragma unroll
    for (int k = 0; k < OwnMatrix::COUNT; k++)
      matrix[k] = load<MATRIX_TYPE, MATRIX_VEC>(
          matrix_at + OwnMatrix::state(k) * matrix_n, min(first + OwnMatrix::row(k), last), matrix_t);
    __syncthreads();  // the tile before has been read
#pragma unroll
    for (int k = 0; k < Own::COUNT; k++) {
      const int t = Own::row(k);
      const bool real = is_real(seq, first + t, p.seqlen);
#pragma unroll
      for (int c = 0; c < Own::N; c++) {
        const float step = step_of(real ? delta[k][c] + bias[c] : NO_STEP);
        const float factor = !SEGMENT ? step : HAS_Z ? z[k][c] * sigmoid(z[k][c]) : 1.0f;
        steps[c] += step;
        s_pair[t][Own::channel() + c] = make_float2(step, real ? value[k][c] * factor : 0.0f);
      }
    }
    if (HAS_SEQ)
      for (int t = threadIdx.x; t < TILE; t += THREADS) {
        s_restart[t] = restart_of(seq, first + t, p.seqlen);
        restarts += s_restart[t];
      }
#pragma unroll
    for (int k = 0; k < OwnMatrix::COUNT; k++) {
      const bool real = is_real(seq, first + OwnMatrix::row(k), p.seqlen);
#pragma unroll
      for (int c = 0; c < MATRIX_VEC; c++)
        if (OwnMatrix::used(k)) s_matrix[OwnMatrix::row(k)][OwnMatrix::state(k) + c] = real ? matrix[k][c] : 0.0f;
    }
    __syncthreads();
#pragma unroll 4
    for (int k = 0; k < TILE; k++) {
      const int t = SEGMENT ? TILE - 1 - k : k;
      const float2 pair = s_pair[t][lane];
#pragma unroll
      for (int i = 0; i < STATES_PER_WARP; i++) {
        const float decay = exp2_fast(HAS_SEQ ? fmaf(pair.x, a2[i], s_restart[t]) : pair.x * a2[i]);
        const float m = s_matrix[t][n0 + i];
        h[i] = SEGMENT ? decay * fmaf(pair.y, m, h[i]) : fmaf(decay, h[i], pair.y * m);
      }
    }
  }
  const long long segment = batch * gridDim.y + blockIdx.y;
#pragma unroll
  for (int i = 0; i < STATES_PER_WARP; i++)
    if (there && n0 + i < STATES) p.carry[(segment * STATES + n0 + i) * p.d_inner + d] = h[i];
#pragma unroll
  for (int c = 0; c < Own::N; c++) s_sum[threadIdx.x / Own::GROUPS][Own::channel() + c] = steps[c];
  if (HAS_SEQ) {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) restarts += __shfl_xor_sync(0xffffffffu, restarts, mask);
    if (lane == 0) s_restarts[warp] = restarts;
  }
  __syncthreads();
  if (warp == 0 && there) {
    float total = 0.0f;
    for (int k = 0; k < Own::STRIDE; k++) total += s_sum[k][lane];
    p.segment_steps[segment * p.d_inner + d] = total;
  }
  if (HAS_SEQ && threadIdx.x == 0) {
    float total = 0.0f;
    for (int w = 0; w < WARPS; w++) total += s_restarts[w];
    p.segment_restarts[segment] = total;
  }
}

// One thread a channel and state: turns what leaves each segment into what enters it; what leaves the last one is end_state.
extern "C" __global__ void chain_segments(const Args p) {
  const int d = blockIdx.x * blockDim.x + threadIdx.x, n = blockIdx.y;
  const int segments = (p.seqlen + p.segment - 1) / p.segment;
  const long long batch = blockIdx.z;
  if (d >= p.d_inner) return;
  const float a2 = p.A[(long long)d * STATES + n] * LOG2_E;
  float h = HAS_STATE ? p.state[(batch * p.d_inner + d) * STATES + n] : 0.0f;
#pragma unroll 4
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
#define GROUP (STATES_PER_WARP <= 4 ? 4 : STATES_PER_WARP <= 8 ? 2 : 1)  // tokens worked on together

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) scan_forward(const Args p) {
  typedef Share<TILE> Own;
  typedef MatrixShare<TILE> OwnMatrix;
  __shared__ __align__(16) float2 s_pair[TILE][CHANNELS];  // step, drive
  __shared__ __align__(16) float s_sum[WARPS][TILE][CHANNELS];
  __shared__ __align__(16) float s_B[TILE][PADDED_STATES], s_C[TILE][PADDED_STATES];
  __shared__ __align__(16) float s_bias[CHANNELS], s_skip[CHANNELS];
  __shared__ float s_restart[TILE];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, n0 = warp * STATES_PER_WARP;
  const long long batch = blockIdx.x / p.blocks;
  const int d0 = (blockIdx.x % p.blocks) * CHANNELS, d = d0 + lane, last = p.seqlen - 1;
  const int* seq = p.seq + (HAS_SEQ ? batch * p.seqlen : 0);
  const bool there = EXACT || d < p.d_inner;

  float h[STATES_PER_WARP], a2[STATES_PER_WARP];
#pragma unroll
  for (int i = 0; i < STATES_PER_WARP; i++) {
    const bool used = there && n0 + i < STATES;
    a2[i] = used ? p.A[(long long)d * STATES + n0 + i] * LOG2_E : 0.0f;
    h[i] = used ? entering(p, batch, n0 + i, d) : 0.0f;
  }
  if (warp == 0) {
    s_bias[lane] = HAS_BIAS && there ? p.bias[d] : 0.0f;
    s_skip[lane] = HAS_D && there ? p.D[d] : 0.0f;
  }
  const int own = d0 + Own::channel(), own_d = EXACT ? own : min(own, p.d_inner - Own::N);
  const char *x_at = at<X_TYPE>(p.x, batch * p.sxb + own_d), *delta_at = at<DELTA_TYPE>(p.delta, batch * p.sdb + own_d);
  const char* z_at = at<Z_TYPE>(p.z, batch * p.szb + own_d);
  char* y_at = at<X_TYPE>(p.y, batch * p.seqlen * p.d_inner + own_d);
  const char *B_at = at<B_TYPE>(p.B, batch * p.sBb), *C_at = at<C_TYPE>(p.C, batch * p.sCb);
  for (int k = threadIdx.x; k < TILE * PADDED_STATES; k += THREADS) s_B[0][k] = s_C[0][k] = 0.0f;

  // Loaded one tile ahead: the loads run while the tile before is scanned
  Pack<X_TYPE, Own::N> x[Own::COUNT], next_x[Own::COUNT];
  Pack<DELTA_TYPE, Own::N> next_delta[Own::COUNT];
  Pack<Z_TYPE, Own::N> z[Own::COUNT], next_z[Own::COUNT];
  Pack<B_TYPE, MATRIX_VEC> next_B[OwnMatrix::COUNT];
  Pack<C_TYPE, MATRIX_VEC> next_C[OwnMatrix::COUNT];
  auto fetch = [&](int first) {
#pragma unroll
    for (int k = 0; k < Own::COUNT; k++) {
      const int row = min(first + Own::row(k), last);
      next_x[k] = load<X_TYPE, Own::N>(x_at, row, p.sxt);
      next_delta[k] = load<DELTA_TYPE, Own::N>(delta_at, row, p.sdt);
      if (HAS_Z) next_z[k] = load<Z_TYPE, Own::N>(z_at, row, p.szt);
    }
#pragma unroll
    for (int k = 0; k < OwnMatrix::COUNT; k++) {
      const int row = min(first + OwnMatrix::row(k), last), n = OwnMatrix::state(k);
      next_B[k] = load<B_TYPE, MATRIX_VEC>(B_at + n * p.sBn, row, p.sBt);
      next_C[k] = load<C_TYPE, MATRIX_VEC>(C_at + n * p.sCn, row, p.sCt);
    }
  };
  const int begin = blockIdx.y * p.segment, end = min(begin + p.segment, p.seqlen);
  fetch(begin);
  __syncthreads();
  for (int first = begin; first < end; first += TILE) {
    const Pack<0, Own::N> bias = floats<Own::N>(s_bias + Own::channel());
#pragma unroll
    for (int k = 0; k < Own::COUNT; k++) {
      const int t = Own::row(k);
      const bool real = is_real(seq, first + t, p.seqlen);
      x[k] = next_x[k];
      if (HAS_Z) z[k] = next_z[k];
#pragma unroll
      for (int c = 0; c < Own::N; c++) {
        const float step = step_of(real ? next_delta[k][c] + bias[c] : NO_STEP);
        s_pair[t][Own::channel() + c] = make_float2(step, !HAS_SEQ || real ? step * x[k][c] : 0.0f);
      }
    }
    if (HAS_SEQ)
      for (int t = threadIdx.x; t < TILE; t += THREADS) s_restart[t] = restart_of(seq, first + t, p.seqlen);
#pragma unroll
    for (int k = 0; k < OwnMatrix::COUNT; k++) {
      const int t = OwnMatrix::row(k), n = OwnMatrix::state(k);
      const bool real = is_real(seq, first + t, p.seqlen);
#pragma unroll
      for (int c = 0; c < MATRIX_VEC; c++)
        if (OwnMatrix::used(k)) {
          s_B[t][n + c] = !HAS_SEQ || real ? next_B[k][c] : 0.0f;
          s_C[t][n + c] = !HAS_SEQ || real ? next_C[k][c] : 0.0f;
        }
    }
    __syncthreads();
    if (first + TILE < end) fetch(first + TILE);
    if (SAVE && first % CHUNK == 0 && there) {
      float* saved = p.chunk_states + (batch * p.n_chunks + first / CHUNK) * STATES * p.d_inner + d;
#pragma unroll
      for (int i = 0; i < STATES_PER_WARP; i++)
        if (n0 + i < STATES) saved[(n0 + i) * p.d_inner] = h[i];
    }
    // A group of tokens at a time. What the next group needs is read before the sums of this one are written, since the compiler
    // keeps reads behind writes
    float2 pair[GROUP];
    float b[GROUP][STATES_PER_WARP], c[GROUP][STATES_PER_WARP];
    auto read_inputs = [&](int first) {
#pragma unroll
      for (int t = 0; t < GROUP; t++) {
        pair[t] = s_pair[first + t][lane];
#pragma unroll
        for (int i = 0; i < STATES_PER_WARP; i++) b[t][i] = s_B[first + t][n0 + i];
      }
    };
    auto read_outputs = [&](int first) {
#pragma unroll
      for (int t = 0; t < GROUP; t++)
#pragma unroll
        for (int i = 0; i < STATES_PER_WARP; i++) c[t][i] = s_C[first + t][n0 + i];
    };
    read_inputs(0);
    read_outputs(0);
#pragma unroll
    for (int t0 = 0; t0 < TILE; t0 += GROUP) {
      float decay[GROUP][STATES_PER_WARP], drive[GROUP][STATES_PER_WARP], sum[GROUP];
#pragma unroll
      for (int t = 0; t < GROUP; t++)
#pragma unroll
        for (int i = 0; i < STATES_PER_WARP; i++) {
          decay[t][i] = exp2_fast(HAS_SEQ ? fmaf(pair[t].x, a2[i], s_restart[t0 + t]) : pair[t].x * a2[i]);
          drive[t][i] = pair[t].y * b[t][i];
        }
      if (t0 + GROUP < TILE) read_inputs(t0 + GROUP);
#pragma unroll
      for (int t = 0; t < GROUP; t++) {
        sum[t] = 0.0f;
#pragma unroll
        for (int i = 0; i < STATES_PER_WARP; i++) {
          h[i] = fmaf(decay[t][i], h[i], drive[t][i]);
          sum[t] = fmaf(h[i], c[t][i], sum[t]);
        }
      }
      if (t0 + GROUP < TILE) read_outputs(t0 + GROUP);
#pragma unroll
      for (int t = 0; t < GROUP; t++) s_sum[warp][t0 + t][lane] = sum[t];
    }
    __syncthreads();
    const Pack<0, Own::N> skip = floats<Own::N>(s_skip + Own::channel());
#pragma unroll
    for (int k = 0; k < Own::COUNT; k++) {
      const int t = Own::row(k);
      const bool real = is_real(seq, first + t, p.seqlen);
      float total[Own::N];
#pragma unroll
      for (int c = 0; c < Own::N; c++) total[c] = HAS_D ? skip[c] * x[k][c] : 0.0f;
#pragma unroll
      for (int w = 0; w < WARPS; w++) {
        const Pack<0, Own::N> sum = floats<Own::N>(&s_sum[w][t][Own::channel()]);
#pragma unroll
        for (int c = 0; c < Own::N; c++) total[c] += sum[c];
      }
#pragma unroll
      for (int c = 0; c < Own::N; c++) {
        if (HAS_Z) total[c] *= z[k][c] * sigmoid(z[k][c]);
        total[c] = !HAS_SEQ || real ? total[c] : 0.0f;
      }
      if (first + t < p.seqlen && (EXACT || own < p.d_inner))
        put<X_TYPE>(y_at + (long long)(first + t) * p.d_inner * ELEMENT_BYTES(X_TYPE), total);
    }
  }
  if (HAS_CARRY) return;  // the end state came with the carries
#pragma unroll
  for (int i = 0; i < STATES_PER_WARP; i++)
    if (there && n0 + i < STATES) p.end_state[(batch * p.d_inner + d) * STATES + n0 + i] = h[i];
}
#endif

#ifdef BACKWARD
#define TILES (CHUNK / TILE)
#define JAM (TILE == 8 && STATES_PER_WARP % 2 == 0 ? 2 : 1)  // states of a warp that are worked on together, to fill its waits
constexpr int UNROLLED = STATES_PER_WARP <= 4 ? STATES_PER_WARP : 1;  // times a loop over a warp's states is written out

// Sums over the lanes of a warp by tensor cores: a product of a 16 x 8 matrix, which holds four values of each lane, with an
// 8 x 8 selector adds them, over groups of four lanes, to two of the eight columns of the accumulators. Tensor cores read 10
// bits of a mantissa: enough for gradients in half precision; for float32 a second product adds what the first cuts off.
struct LaneSums {
  static constexpr int COUNT = 2 * TILE * JAM / 16;
  static_assert(COUNT <= 2, "a lane ends with one sum");
  float sums[COUNT][4], selector[8];

  __device__ __forceinline__ LaneSums(int lane) {
#pragma unroll
    for (int k = 0; k < 8; k++) selector[k] = lane / 4 == k ? 1.0f : 0.0f;
  }
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int k = 0; k < COUNT; k++) sums[k][0] = sums[k][1] = sums[k][2] = sums[k][3] = 0.0f;
  }
  static __device__ __forceinline__ void multiply(float (&d)[4], const float (&a)[4], float b0, float b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])),
          "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
  }
  // Adds the lanes' values to the sums number `first` (a multiple of four) and following.
  __device__ __forceinline__ void add(int first, const float (&values)[4]) {
    const int column = first / 2 % 8;
    if (X_TYPE == 0) {
      float rest[4];
#pragma unroll
      for (int k = 0; k < 4; k++) rest[k] = values[k] - __uint_as_float(__float_as_uint(values[k]) & 0xffffe000u);
      multiply(sums[first / 16], rest, selector[column], selector[column + 1]);
    }
    multiply(sums[first / 16], values, selector[column], selector[column + 1]);
  }
  // Completes the sums; a lane gets the one whose number is `number`.
  static __device__ __forceinline__ int number(int lane) {
    const int bit0 = lane / 4 % 2, bit1 = lane / 8 % 2, bit2 = lane / 16;
    return 4 * (lane % 4) + 2 * bit0 + bit1 + (COUNT == 2 ? 16 * bit2 : 0);
  }
  __device__ __forceinline__ float total(int lane) const {
    float pair[COUNT];
#pragma unroll
    for (int k = 0; k < COUNT; k++) {
      const float low = half(sums[k][0], sums[k][1], lane, 4), high = half(sums[k][2], sums[k][3], lane, 4);
      pair[k] = half(low, high, lane, 8);
    }
    return half(pair[0], pair[COUNT - 1], lane, 16);
  }
  // Hands one of two values to the partner lane and adds the one that comes back.
  static __device__ __forceinline__ float half(float low, float high, int lane, int mask) {
    return (lane & mask ? high : low) + __shfl_xor_sync(0xffffffffu, lane & mask ? low : high, mask);
  }
};

// Chunk by chunk from the end. For each, the states at its tiles are recomputed from the saved one; then each tile, from the
// last, recomputes its states and runs the adjoint recurrence backwards.
extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) scan_backward(const Args p) {
  typedef Share<CHUNK> Own;  // when a chunk is loaded
  typedef Share<TILE> Out;   // when a tile's gradients are stored
  typedef MatrixShare<CHUNK> OwnMatrix;
  extern __shared__ __align__(16) float memory[];
  // Private to a thread (its states of its channel): states at the tiles of a chunk, adjoint, gradient of A, log2(e) A
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
  float *s_restart = (float*)(s_C + PADDED_STATES), *s_bias = s_restart + CHUNK, *s_skip = s_bias + CHANNELS;

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, n0 = warp * STATES_PER_WARP;
  const long long batch = blockIdx.x / p.blocks;
  const int block = blockIdx.x % p.blocks, d0 = block * CHANNELS, d = d0 + lane, last = p.seqlen - 1;
  const int* seq = p.seq + (HAS_SEQ ? batch * p.seqlen : 0);
  const bool there = EXACT || d < p.d_inner;

  for (int n = n0; n < n0 + STATES_PER_WARP; n++) {
    const bool used = there && n < STATES;
    s_a2[n][lane] = used ? p.A[(long long)d * STATES + n] * LOG2_E : 0.0f;
    s_g[n][lane] = used ? entering(p, batch, n, d) : 0.0f;
    s_dA[n][lane] = 0.0f;
    s_h[0][n][lane] = 0.0f;
  }
  if (warp == 0) {
    s_bias[lane] = HAS_BIAS && there ? p.bias[d] : 0.0f;
    s_skip[lane] = HAS_D && there ? p.D[d] : 0.0f;
  }
  const char *x_at = at<X_TYPE>(p.x, batch * p.sxb), *delta_at = at<DELTA_TYPE>(p.delta, batch * p.sdb);
  const char *z_at = at<Z_TYPE>(p.z, batch * p.szb), *grad_at = at<X_TYPE>(p.grad_y, batch * p.sgb);
  const int own = d0 + Own::channel(), own_d = EXACT ? own : min(own, p.d_inner - Own::N);
  const int out = d0 + Out::channel(), out_d = EXACT ? out : min(out, p.d_inner - Out::N);
  const long long to = batch * p.seqlen * p.d_inner + out_d;
  char* to_gate = at<Z_TYPE>(p.grad_z, batch * p.sob + out_d);
  const char *B_at = at<B_TYPE>(p.B, batch * p.sBb), *C_at = at<C_TYPE>(p.C, batch * p.sCb);
  for (int k = threadIdx.x; k < PADDED_STATES * CHUNK; k += THREADS) s_B[0][k] = s_C[0][k] = 0.0f;
  float sum_D[Out::N], sum_bias[Out::N];
#pragma unroll
  for (int c = 0; c < Out::N; c++) sum_D[c] = sum_bias[c] = 0.0f;
  LaneSums lane_sums(lane);

  const int first_chunk = blockIdx.y * (p.segment / CHUNK);
  for (int chunk = min(first_chunk + p.segment / CHUNK, p.n_chunks) - 1; chunk >= first_chunk; chunk--) {
    const int begin = chunk * CHUNK, tiles = (min(CHUNK, p.seqlen - begin) + TILE - 1) / TILE, end = last - begin;
    // What all threads share is added up to here, what differs is small: addresses of 32 bits
    const char *x_chunk = x_at + (long long)begin * p.sxt, *delta_chunk = delta_at + (long long)begin * p.sdt;
    const char *z_chunk = z_at + (long long)begin * p.szt, *grad_chunk = grad_at + (long long)begin * p.sgt;
    const char *B_chunk = B_at + (long long)begin * p.sBt, *C_chunk = C_at + (long long)begin * p.sCt;
    float *part_B = p.part_B + ((long long)block * p.batches + batch) * STATES * p.padded + begin;
    float* part_C = p.part_C + (part_B - p.part_B);
    __syncthreads();  // the chunk after has been read
    const Pack<0, Own::N> bias = floats<Own::N>(s_bias + Own::channel());
#pragma unroll
    for (int k = 0; k < Own::COUNT; k++) {
      const int t = Own::row(k), row = min(t, end);
      const bool real = is_real(seq, begin + t, p.seqlen), used = real && (EXACT || own < p.d_inner);
      const Pack<X_TYPE, Own::N> x = pick<X_TYPE, Own::N>(x_chunk, row, p.sxt, own_d);
      const Pack<X_TYPE, Own::N> grad_y = pick<X_TYPE, Own::N>(grad_chunk, row, p.sgt, own_d);
      const Pack<DELTA_TYPE, Own::N> delta = pick<DELTA_TYPE, Own::N>(delta_chunk, row, p.sdt, own_d);
      Pack<Z_TYPE, Own::N> z;
      if (HAS_Z) z = pick<Z_TYPE, Own::N>(z_chunk, row, p.szt, own_d);
      float steps[Own::N], drives[Own::N], grads[Own::N];
#pragma unroll
      for (int c = 0; c < Own::N; c++) {
        steps[c] = step_of(real ? delta[c] + bias[c] : NO_STEP);
        drives[c] = !HAS_SEQ || real ? steps[c] * x[c] : 0.0f;
        const float grad = HAS_Z ? grad_y[c] * (z[c] * sigmoid(z[c])) : grad_y[c];
        grads[c] = used ? grad : 0.0f;
      }
      put<0>(&s_step[t][Own::channel()], steps);
      put<0>(&s_drive[t][Own::channel()], drives);
      put<0>(&s_grad[t][Own::channel()], grads);
    }
    if (HAS_SEQ)
      for (int t = threadIdx.x; t < CHUNK; t += THREADS) s_restart[t] = restart_of(seq, begin + t, p.seqlen);
#pragma unroll
    for (int k = 0; k < OwnMatrix::COUNT; k++) {
      const int t = OwnMatrix::row(k), n = OwnMatrix::state(k), row = min(t, end);
      const bool real = is_real(seq, begin + t, p.seqlen);
      const auto B = *(const Pack<B_TYPE, MATRIX_VEC>*)(B_chunk + (unsigned)(row * p.sBt + n * p.sBn));
      const auto C = *(const Pack<C_TYPE, MATRIX_VEC>*)(C_chunk + (unsigned)(row * p.sCt + n * p.sCn));
#pragma unroll
      for (int c = 0; c < MATRIX_VEC; c++)
        if (OwnMatrix::used(k)) {
          s_B[n + c][t] = !HAS_SEQ || real ? B[c] : 0.0f;
          s_C[n + c][t] = !HAS_SEQ || real ? C[c] : 0.0f;
        }
    }
    if (there) {
      const float* saved = p.chunk_states + (batch * p.n_chunks + chunk) * STATES * p.d_inner + d;
#pragma unroll
      for (int i = 0; i < STATES_PER_WARP; i++)
        if (n0 + i < STATES) s_h[0][n0 + i][lane] = saved[(long long)(n0 + i) * p.d_inner];
    }
    __syncthreads();

    for (int tile = 0; tile < tiles - 1; tile++) {  // forwards, for the states at the tiles
      float step[TILE], drive[TILE];
#pragma unroll
      for (int t = 0; t < TILE; t++) {
        step[t] = s_step[tile * TILE + t][lane];
        drive[t] = s_drive[tile * TILE + t][lane];
      }
#pragma unroll UNROLLED
      for (int i = 0; i < STATES_PER_WARP; i += JAM) {
        const int n = n0 + i;
        const float* restart = s_restart + tile * TILE;
        float h[JAM], a2[JAM];
#pragma unroll
        for (int j = 0; j < JAM; j++) {
          h[j] = s_h[tile][n + j][lane];
          a2[j] = s_a2[n + j][lane];
        }
#pragma unroll
        for (int t = 0; t < TILE; t++)
#pragma unroll
          for (int j = 0; j < JAM; j++) {
            const float decay = exp2_fast(HAS_SEQ ? fmaf(step[t], a2[j], restart[t]) : step[t] * a2[j]);
            h[j] = fmaf(decay, h[j], drive[t] * s_B[n + j][tile * TILE + t]);
          }
#pragma unroll
        for (int j = 0; j < JAM; j++) s_h[tile + 1][n + j][lane] = h[j];
      }
    }

    for (int tile = tiles - 1; tile >= 0; tile--) {  // backwards
      const int offset = tile * TILE;
      float step[TILE], drive[TILE], grad[TILE], total[TILE], grad_exponent[TILE], grad_drive[TILE];
#pragma unroll
      for (int t = 0; t < TILE; t++) {
        step[t] = s_step[offset + t][lane];
        drive[t] = s_drive[offset + t][lane];
        grad[t] = s_grad[offset + t][lane];
        total[t] = grad_exponent[t] = grad_drive[t] = 0.0f;
      }
#pragma unroll UNROLLED
      for (int i = 0; i < STATES_PER_WARP; i += JAM) {
        const int n = n0 + i;
        const float* restart = s_restart + offset;
        float decay[JAM][TILE], before[JAM][TILE];  // before: the state before the token
        float h[JAM], g[JAM], dA[JAM], a2[JAM], values[JAM][4];
        lane_sums.clear();
#pragma unroll
        for (int j = 0; j < JAM; j++) {
          h[j] = s_h[tile][n + j][lane];
          g[j] = s_g[n + j][lane];
          dA[j] = s_dA[n + j][lane];
          a2[j] = s_a2[n + j][lane];
        }
#pragma unroll
        for (int t = 0; t < TILE; t++)
#pragma unroll
          for (int j = 0; j < JAM; j++) {
            decay[j][t] = exp2_fast(HAS_SEQ ? fmaf(step[t], a2[j], restart[t]) : step[t] * a2[j]);
            before[j][t] = h[j];
            h[j] = fmaf(decay[j][t], h[j], drive[t] * s_B[n + j][offset + t]);
            if (HAS_Z) total[t] = fmaf(h[j], s_C[n + j][offset + t], total[t]);
            values[j][t % 4] = grad[t] * h[j];
            if (t % 4 == 3) lane_sums.add((2 * j + 1) * TILE + t - 3, values[j]);
          }
#pragma unroll
        for (int t = TILE - 1; t >= 0; t--)
#pragma unroll
          for (int j = 0; j < JAM; j++) {
            const float into = fmaf(grad[t], s_C[n + j][offset + t], g[j]);
            g[j] = decay[j][t] * into;
            const float pull = g[j] * before[j][t];
            grad_exponent[t] = fmaf(pull, a2[j], grad_exponent[t]);
            grad_drive[t] = fmaf(into, s_B[n + j][offset + t], grad_drive[t]);
            dA[j] = fmaf(pull, step[t], dA[j]);
            values[j][t % 4] = into * drive[t];
            if (t % 4 == 0) lane_sums.add(2 * j * TILE + t, values[j]);
          }
#pragma unroll
        for (int j = 0; j < JAM; j++) {
          s_g[n + j][lane] = g[j];
          s_dA[n + j][lane] = dA[j];
        }
        const float sum = lane_sums.total(lane);
        const int number = LaneSums::number(lane), n_sum = n + number / (2 * TILE);
        float* part = number / TILE % 2 ? part_C : part_B;
        if (n_sum < STATES && (LaneSums::COUNT == 2 || lane < 16))
          part[(unsigned)(n_sum * p.padded + offset + number % TILE)] = sum;
      }

      Pack<X_TYPE, Out::N> x[Out::COUNT], grad_y[Out::COUNT];
      Pack<DELTA_TYPE, Out::N> delta[Out::COUNT];
      Pack<Z_TYPE, Out::N> z[Out::COUNT];
#pragma unroll
      for (int k = 0; k < Out::COUNT; k++) {
        const int row = min(offset + Out::row(k), end);
        x[k] = pick<X_TYPE, Out::N>(x_chunk, row, p.sxt, out_d);
        if (SOFTPLUS && DELTA_TYPE == 0) delta[k] = pick<DELTA_TYPE, Out::N>(delta_chunk, row, p.sdt, out_d);
        if (HAS_Z) z[k] = pick<Z_TYPE, Out::N>(z_chunk, row, p.szt, out_d);
        if (HAS_Z) grad_y[k] = pick<X_TYPE, Out::N>(grad_chunk, row, p.sgt, out_d);
      }
      __syncthreads();  // the sums of the tile after have been read
#pragma unroll
      for (int t = 0; t < TILE; t++) {
        s_sum[warp][0][t][lane] = grad_exponent[t];
        s_sum[warp][1][t][lane] = grad_drive[t];
        if (HAS_Z) s_sum[warp][2][t][lane] = total[t];
      }
      __syncthreads();
#pragma unroll
      for (int k = 0; k < Out::COUNT; k++) {
        const int t = Out::row(k), ch = Out::channel();
        const bool inside = offset + t <= end, real = is_real(seq, begin + offset + t, p.seqlen);
        float sums[3][Out::N];
#pragma unroll
        for (int s = 0; s < (HAS_Z ? 3 : 2); s++)
#pragma unroll
          for (int w = 0; w < WARPS; w++) {
            const Pack<0, Out::N> part = floats<Out::N>(&s_sum[w][s][t][ch]);
#pragma unroll
            for (int c = 0; c < Out::N; c++) sums[s][c] = w == 0 ? part[c] : sums[s][c] + part[c];
          }
        const Pack<0, Out::N> step_ = floats<Out::N>(&s_step[offset + t][ch]);
        const Pack<0, Out::N> before_gate = floats<Out::N>(&s_grad[offset + t][ch]);
        const Pack<0, Out::N> skip = floats<Out::N>(s_skip + ch), shift = floats<Out::N>(s_bias + ch);
        float to_x[Out::N], to_delta[Out::N], to_z[Out::N];
#pragma unroll
        for (int c = 0; c < Out::N; c++) {
          const float xt = !HAS_SEQ || real ? x[k][c] : 0.0f;
          float d_delta = fmaf(sums[0][c], LN_2, sums[1][c] * xt);
          // The slope of softplus, from the step where half precision is enough
          if (SOFTPLUS) d_delta *= DELTA_TYPE == 0 ? sigmoid(delta[k][c] + shift[c]) : 1.0f - exp2_fast(step_[c] * -LOG2_E);
          d_delta = real ? d_delta : 0.0f;
          sum_D[c] = fmaf(before_gate[c], xt, sum_D[c]);
          sum_bias[c] += d_delta;
          to_delta[c] = d_delta;
          to_x[c] = !HAS_SEQ || real ? fmaf(sums[1][c], step_[c], skip[c] * before_gate[c]) : 0.0f;
          if (HAS_Z) {
            const float gate = z[k][c], s = sigmoid(gate);
            const float d_z = grad_y[k][c] * fmaf(skip[c], xt, sums[2][c]) * s * fmaf(gate, 1.0f - s, 1.0f);
            to_z[c] = !HAS_SEQ || real ? d_z : 0.0f;
          }
        }
        if (inside && (EXACT || out < p.d_inner)) {
          const long long place = to + (long long)(begin + offset + t) * p.d_inner;
          put<X_TYPE>(at<X_TYPE>(p.grad_x, place), to_x);
          put<DELTA_TYPE>(at<DELTA_TYPE>(p.grad_delta, place), to_delta);
          if (HAS_Z) put<Z_TYPE>(to_gate + (long long)(begin + offset + t) * p.sot, to_z);
        }
      }
    }
  }

  float(*s_end)[2][CHANNELS] = (float(*)[2][CHANNELS])s_sum;
  __syncthreads();
#pragma unroll
  for (int c = 0; c < Out::N; c++) {
    s_end[threadIdx.x / Out::GROUPS][0][Out::channel() + c] = sum_D[c];
    s_end[threadIdx.x / Out::GROUPS][1][Out::channel() + c] = sum_bias[c];
  }
  __syncthreads();
  if (!there) return;
  float* sums = p.part_sums + (batch * gridDim.y + blockIdx.y) * (STATES + 2) * p.d_inner + d;
  for (int n = n0; n < min(n0 + STATES_PER_WARP, STATES); n++) {
    sums[(long long)n * p.d_inner] = s_dA[n][lane];
    if (HAS_INITIAL && !HAS_CARRY) p.end_state[(batch * p.d_inner + d) * STATES + n] = s_g[n][lane];
  }
  for (int s = warp; s < 2; s += WARPS) {
    float total = 0.0f;
    for (int k = 0; k < Out::STRIDE; k++) total += s_end[k][s][lane];
    sums[(long long)(STATES + s) * p.d_inner] = total;
  }
}

// Sums the partial gradients of B (grid.z = 0) and C over the blocks, in a fixed order, and puts them as (batch, seqlen, n).
#define SUM_TOKENS 128

extern "C" __global__ void sum_tokens(const Args p) {
  __shared__ float s_total[16][SUM_TOKENS + 4];
  const long long batch = blockIdx.y, stride = (long long)p.batches * STATES * p.padded;
  const int first = blockIdx.x * SUM_TOKENS, lane = threadIdx.x % 32, tokens = min(SUM_TOKENS, p.seqlen - first);
  for (int n0 = 0; n0 < STATES; n0 += blockDim.x / 32) {
    const int n = n0 + threadIdx.x / 32;
    float total[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    if (n < STATES && first + 4 * lane < p.padded) {
      const float* part = (blockIdx.z == 0 ? p.part_B : p.part_C) + (batch * STATES + n) * p.padded + first + 4 * lane;
#pragma unroll 8
      for (int block = 0; block < p.blocks; block++) {
        const Pack<0, 4> own = floats<4>(part + block * stride);
#pragma unroll
        for (int k = 0; k < 4; k++) total[k] += own[k];
      }
    }
    __syncthreads();  // the states before have been stored
    put<0>(&s_total[threadIdx.x / 32][4 * lane], total);
    __syncthreads();
    const int states = min((int)blockDim.x / 32, STATES - n0);
    for (int k = threadIdx.x; k < tokens * states; k += blockDim.x) {
      const float one[1] = {s_total[k % states][k / states]};
      const long long to = (batch * p.seqlen + first + k / states) * STATES + n0 + k % states;
      if (blockIdx.z == 0) put<B_TYPE>(at<B_TYPE>(p.grad_B, to), one);
      else put<C_TYPE>(at<C_TYPE>(p.grad_C, to), one);
    }
  }
}

// Sums the gradients of A, D and bias over rows of the batch and segments, in a fixed order: grid.y is a state, then D and bias.
extern "C" __global__ void sum_rows(const Args p) {
  __shared__ float s_total[8][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, d = blockIdx.x * 32 + lane;
  const int parts = p.batches * ((p.seqlen + p.segment - 1) / p.segment);
  float total = 0.0f;
  if (d < p.d_inner)
    for (int part = warp; part < parts; part += 8)
      total += p.part_sums[((long long)part * (STATES + 2) + blockIdx.y) * p.d_inner + d];
  s_total[warp][lane] = total;
  __syncthreads();
  if (warp > 0 || d >= p.d_inner) return;
  for (int w = 1; w < 8; w++) total += s_total[w][lane];
  if (blockIdx.y < STATES) p.grad_A[(long long)d * STATES + blockIdx.y] = total;
  else (blockIdx.y == STATES ? p.grad_D : p.grad_bias)[d] = total;
}
#endif
