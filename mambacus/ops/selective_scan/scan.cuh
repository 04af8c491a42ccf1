// The selective scan for NVIDIA GPUs: what scan_forward.cu and scan_backward.cu share. NVRTC compiles it before one of them at
// run time; gpu_cuda.py gives the macros and launches.
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
// HAS_CARRY, SOFTPLUS, SAVE, EXACT (d_inner is a multiple of a block's channels); backwards SETS of CHANNELS channels that a
// block takes one after the other, HAS_Y (y is given, which tells what was before the gate).

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
